//! The keys of rotary position embedding.

use super::super::arch::Architecture;
use super::super::keys::Keys;
use super::super::rope::{RopeScaling, long_attention, yarn_attention};
use super::Error;

/// What the keys say.
pub(super) struct Turns {
    /// Base of the frequencies.
    pub theta: f64,
    /// Their stretching.
    pub scaling: RopeScaling,
    /// Base of those of layers with windows, if it is given beside the others.
    pub local_theta: Option<f64>,
    /// Columns of a head that turn.
    pub columns: usize,
}

/// Base and scaling of the rotary frequencies: from `rope_scaling` or else `rope_parameters`, as transformers 5 has it,
/// with the base from the top level where they have none. `context` is the longest one; it becomes shorter where a rule
/// would change with the length of the text.
pub(super) fn read(
    keys: &Keys,
    reading: &Architecture,
    head_dim: usize,
    context: &mut usize,
    notes: &mut Vec<String>,
) -> Result<Turns, Error> {
    let path = keys.path();
    let full = |key: &str| keys.object(key).map(|o| o.filter(|o| o.unasked().next().is_some()));
    let (scaling, parameters) = (full("rope_scaling")?, full("rope_parameters")?);
    if let (Some(s), Some(p)) = (&scaling, &parameters)
        && !s.unasked().eq(p.unasked())
    {
        notes.push(format!("{}: rope_scaling is used, and rope_parameters beside it is not", path.display()));
    }
    let named = if scaling.is_some() { "rope_scaling" } else { "rope_parameters" };
    let mut source = scaling.or(parameters);
    // Since transformers 5 there may be one for each kind of layer.
    let mut local_theta = None;
    if let Some(all) = source.take() {
        source = match (all.object("full_attention")?, all.object("sliding_attention")?) {
            (None, None) => Some(all),
            (main, local) => {
                if let Some(local) = &local {
                    let kind = local.text("rope_type")?.unwrap_or("default".to_owned());
                    if kind != "default" {
                        return Err(Error::Unsupported {
                            path: path.to_owned(),
                            what: format!("rope scaling '{kind}' of layers with windows"),
                            supported: "default".to_owned(),
                        });
                    }
                    local_theta = local.number("rope_theta")?;
                }
                main
            }
        };
    }
    let source = source;
    let number = |name: &str| source.as_ref().map_or(Ok(None), |s| s.number(name));
    let theta = number("rope_theta")?.or(keys.number("rope_theta")?).unwrap_or(reading.theta);
    if theta <= 0.0 || theta == 1.0 {
        return Err(Error::file(path, format!("rope_theta is {theta}: expected a positive number")));
    }
    let outer_original = keys.number("original_max_position_embeddings")?;
    let columns = columns(keys, reading, head_dim, number("partial_rotary_factor")?)?;
    let turns = |scaling| Turns { theta, scaling, local_theta, columns };
    let Some(source) = &source else { return Ok(turns(RopeScaling::None)) };
    // Before transformers 4.43 the key was `type`.
    let (kind, old) = (source.text("rope_type")?, source.text("type")?);
    let kind = kind.or(old).unwrap_or("default".to_owned());
    let positive = |name: &str, value: f64| match value {
        v if v > 0.0 => Ok(v),
        v => Err(Error::file(path, format!("{name} of rope scaling '{kind}' is {v}: expected a positive number"))),
    };
    let need = |name: &str| match number(name)? {
        Some(v) => positive(name, v),
        None => Err(Error::file(path, format!("rope scaling '{kind}' needs {name}"))),
    };
    let or = |name: &str, default: f64| positive(name, number(name)?.unwrap_or(default));
    let max_positions = *context as f64;
    let original = || -> Result<f64, Error> {
        let original = number("original_max_position_embeddings")?.or(outer_original).unwrap_or(max_positions);
        positive("original_max_position_embeddings", original)
    };
    let scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        // Frequencies change only beyond the longest context.
        "dynamic" => {
            need("factor")?;
            notes.push(format!(
                "{}: the context ends at {context}, where rope scaling 'dynamic' would begin",
                path.display()
            ));
            RopeScaling::None
        }
        "llama3" => {
            let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
            if high <= low {
                return Err(Error::file(
                    path,
                    format!("high_freq_factor ({high}) must be above low_freq_factor ({low})"),
                ));
            }
            let (factor, original) = (need("factor")?, original()?);
            RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original }
        }
        "yarn" => {
            let (factor, original) = (need("factor")?, original()?);
            let larger = |by: f64| yarn_attention(factor, by);
            let of_all = (number("mscale")?.filter(|m| *m != 0.0), number("mscale_all_dim")?.filter(|m| *m != 0.0));
            let inferred = match of_all {
                (Some(m), Some(all)) => larger(m) / larger(all),
                _ => larger(1.0),
            };
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: or("beta_fast", 32.0)?,
                beta_slow: or("beta_slow", 1.0)?,
                truncate: source.truth("truncate")?.unwrap_or(true),
                attention: or("attention_factor", inferred)?,
            }
        }
        "longrope" | "su" => {
            let factors = |name: &str| {
                // In single precision, as transformers takes them and other files keep them.
                let single = |f: f64| f64::from(f as f32);
                let all: Vec<f64> = source.numbers(name)?.unwrap_or_default().into_iter().map(single).collect();
                if all.len() != columns / 2 || !all.iter().all(|f| *f > 0.0 && f.is_finite()) {
                    let what = format!("{name} of rope scaling '{kind}': expected {} positive numbers", columns / 2);
                    return Err(Error::file(path, what));
                }
                Ok(all)
            };
            let original = original()?;
            // The ratio of the contexts counts, where both are given.
            let given = if original < max_positions { None } else { number("factor")? };
            let factor = given.unwrap_or(max_positions / original);
            source.ignore(&["factor", "short_mscale", "long_mscale"]);
            let inferred = long_attention(factor, original);
            RopeScaling::Long {
                short: factors("short_factor")?,
                long: factors("long_factor")?,
                original: original as usize,
                attention: or("attention_factor", inferred)?,
            }
        }
        other => {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: format!("rope scaling '{other}'"),
                supported: "default, linear, dynamic, llama3, yarn, longrope".to_owned(),
            });
        }
    };
    if let Some((key, _)) = source.unasked().find(|(k, _)| k.contains("section")) {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            what: format!("{key} of {named}"),
            supported: "one position for each token".to_owned(),
        });
    }
    if let Some(beta) = number("llama_4_scaling_beta")?.filter(|b| *b != 0.0) {
        // Scores grow with the logarithm of how often the original context fits in the position: not at all in the first.
        *context = (*context).min(original()? as usize);
        notes.push(format!(
            "{}: the context ends at {context}, where scores would be scaled by position (llama_4_scaling_beta {beta})",
            path.display()
        ));
    }
    if matches!(scaling, RopeScaling::Long { .. }) {
        source.ignore(&["original_max_position_embeddings"]);
    }
    let unused: Vec<&str> = source.unasked().map(|(k, _)| k).collect();
    if !unused.is_empty() {
        notes.push(format!("{}: rope scaling '{kind}' has no use for {}", path.display(), unused.join(", ")));
    }
    Ok(turns(scaling))
}

/// Columns of a head that turn. `inner` is `partial_rotary_factor` beside the base.
fn columns(keys: &Keys, reading: &Architecture, head_dim: usize, inner: Option<f64>) -> Result<usize, Error> {
    let Some(default) = reading.partial else {
        if let Some(part) = inner.filter(|p| *p != 1.0) {
            return Err(Error::Unsupported {
                path: keys.path().to_owned(),
                what: format!("partial_rotary_factor {part}"),
                supported: "1".to_owned(),
            });
        }
        return Ok(head_dim);
    };
    let part = inner.or(keys.number("partial_rotary_factor")?).unwrap_or(default);
    let columns = (head_dim as f64 * part) as usize;
    if !(part > 0.0 && part <= 1.0) || columns < 2 || !columns.is_multiple_of(2) {
        let what =
            format!("partial_rotary_factor is {part}: of {head_dim} columns, an even number is to turn, at least 2");
        return Err(Error::file(keys.path(), what));
    }
    Ok(columns)
}
