//! Machine code of kernels, compiled once: NVRTC ([`qp_codegen::nvrtc`]) behind a cache on disk; and the launches that
//! were measured to be best, kept in the same folder ([`launches`]).

mod cache;
pub mod launches;

pub use cache::{Cache, Status as CacheStatus, VARIABLE as CACHE_VARIABLE};
pub use qp_codegen::nvrtc::{
    CompileError as JitError, Cubin, Nvrtc, Options, Usage, VARIABLE as NVRTC_VARIABLE, for_tests as nvrtc_for_tests,
};

use cache::{Key, Kind};
use qp_codegen::nvrtc;

/// Compiles `source` for `target` (`sm_90a`), or takes it from the user's cache. `name` is for messages.
///
/// # Errors
/// No NVRTC, an unknown target, or an error in the source (with its log and the file that holds the source).
pub fn compile(source: &str, name: &str, target: &str, options: &Options) -> Result<Cubin, JitError> {
    compile_in(&Cache::of_user(), source, name, target, options)
}

/// [`compile`] with a cache of the caller's choice.
///
/// # Errors
/// As [`compile`].
pub fn compile_in(cache: &Cache, source: &str, name: &str, target: &str, options: &Options) -> Result<Cubin, JitError> {
    let version = nvrtc_version()?;
    let flags = nvrtc::flags(target, options);
    let key = Key::new(Kind::Cubin, [source, &version].into_iter().chain(flags.iter().map(String::as_str)));
    if let Some((log, code)) = cache.get(&key) {
        return Ok(Cubin::new(code, log));
    }
    let cubin = nvrtc::compile(source, name, target, options)?;
    cache.put(&key, &cubin.log, &cubin.bytes);
    Ok(cubin)
}

/// What enters keys: another NVRTC makes other code.
fn nvrtc_version() -> Result<String, JitError> {
    let (major, minor) = Nvrtc::get()?.version();
    Ok(format!("{major}.{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use qp_codegen::nvrtc::compile_ptx;

    const SOURCE: &str = r#"extern "C" __global__ void k(float* x) { x[threadIdx.x] *= 2.0f; }"#;

    #[test]
    fn compiles_and_takes_from_the_cache() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let options = Options::default();
        let first = compile_in(&cache, SOURCE, "k", "sm_80", &options).unwrap();
        assert!(first.bytes.starts_with(b"\x7fELF"));
        let usage = first.usage.unwrap();
        assert!(usage.registers > 0 && usage.spill_stores == 0, "{usage:?}");
        assert_eq!(cache.status().entries, 1);
        assert_eq!(compile_in(&cache, SOURCE, "k", "sm_80", &options).unwrap(), first);
        // A damaged entry is replaced.
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        std::fs::write(&file, b"not a cubin").unwrap();
        assert_eq!(compile_in(&cache, SOURCE, "k", "sm_80", &options).unwrap().bytes, first.bytes);
        assert!(std::fs::read(&file).unwrap().len() > first.bytes.len());
        // Another target or option is another entry.
        compile_in(&cache, SOURCE, "k", "sm_90a", &options).unwrap();
        compile_in(&cache, SOURCE, "k", "sm_80", &Options { line_info: true, ..Options::default() }).unwrap();
        assert_eq!(cache.status().entries, 3);
    }

    #[test]
    fn ptx_is_text() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let ptx = compile_ptx(SOURCE, "k", "sm_90a", &Options::default()).unwrap();
        assert!(ptx.contains(".target sm_90a") && ptx.contains(".entry k"), "{ptx}");
    }

    #[test]
    fn errors_carry_log_and_source() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        let bad = "extern \"C\" __global__ void k() { undeclared = 1; }";
        let e = compile_in(&Cache::none(), bad, "bad_kernel", "sm_80", &Options::default()).unwrap_err();
        let JitError::Source { log, file: Some(file), .. } = &e else { panic!("{e}") };
        assert!(log.contains("undeclared"));
        assert_eq!(std::fs::read_to_string(file).unwrap(), bad);
        assert!(e.to_string().contains(&file.display().to_string()));
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn unknown_targets_are_named_with_those_that_work() {
        if nvrtc_for_tests().is_none() {
            return;
        }
        for target in ["sm_35", "volta", "compute_80", ""] {
            let e = compile(SOURCE, "k", target, &Options::default()).unwrap_err();
            assert!(matches!(e, JitError::Target { .. }), "{e}");
            assert!(e.to_string().contains("sm_80"), "{e}");
        }
        assert!(matches!(compile("\0", "k", "sm_80", &Options::default()), Err(JitError::Nul)));
    }
}
