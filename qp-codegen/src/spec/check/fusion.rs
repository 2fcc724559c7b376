//! Fusion patterns: each matrix once, in launches whose matrices share their input.

use super::{Sink, consts::unknown};
use crate::spec::{Epilogue, Fusion, Launch, Matrix, Prologue};
use crate::syntax::ast::{self, Ident};
use crate::syntax::diag::{Diagnostic, Span};

/// Checks a fusion pattern.
pub fn check(f: &ast::Fusion, sink: &mut Sink) -> Option<Fusion> {
    let mut seen: Vec<(Matrix, Span)> = Vec::new();
    let mut ok = true;
    let mut launches = Vec::new();
    for l in &f.launches {
        match launch(l, &mut seen, sink) {
            Some(l) => launches.push(l),
            None => ok = false,
        }
    }
    let missing: Vec<&str> =
        Matrix::ALL.into_iter().filter(|m| seen.iter().all(|s| s.0 != *m)).map(Matrix::name).collect();
    if ok && !f.incomplete && !missing.is_empty() {
        let d = Diagnostic::error(
            f.name.span,
            format!("the fusion pattern `{}` never launches {}", f.name.name, missing.join(", ")),
            "",
        );
        return sink
            .fail(d.hint(format!("add `launch {}`: every matrix of a layer must be in one launch", missing[0])));
    }
    launches.sort_by_key(|l| l.matrices.iter().copied().min());
    ok.then(|| Fusion { name: f.name.name.clone(), launches })
}

fn launch(l: &ast::Launch, seen: &mut Vec<(Matrix, Span)>, sink: &mut Sink) -> Option<Launch> {
    let mut ok = true;
    let mut matrices: Vec<Matrix> = Vec::new();
    for name in &l.matrices {
        let Some(m) = by_name(name, "matrix", &Matrix::ALL, Matrix::name, sink) else {
            ok = false;
            continue;
        };
        if let Some((_, first)) = seen.iter().find(|s| s.0 == m) {
            let d = Diagnostic::error(name.span, format!("`{}` is launched twice", name.name), "again here");
            sink.push(d.label(*first, "first here"));
            ok = false;
        }
        if let Some(first) = matrices.first().filter(|f| f.input() != m.input()) {
            let d = Diagnostic::error(
                name.span,
                format!("`{}` cannot share a launch with `{}`", m.name(), first.name()),
                "",
            );
            sink.push(d.hint(format!("`{}` multiplies {}, `{}` {}", first.name(), first.input(), m.name(), m.input())));
            ok = false;
        }
        seen.push((m, name.span));
        matrices.push(m);
    }
    let mut prologue: Vec<Prologue> = Vec::new();
    for name in &l.prologue {
        let Some(p) = by_name(name, "prologue", &Prologue::ALL, Prologue::name, sink) else {
            ok = false;
            continue;
        };
        if let Some(last) = prologue.last().filter(|last| **last >= p) {
            let d = Diagnostic::error(name.span, format!("`{}` cannot follow `{}`", p.name(), last.name()), "");
            sink.push(d.hint("the rotation comes last, and nothing comes twice"));
            ok = false;
        }
        let fits = match p {
            Prologue::Rotate => true,
            Prologue::RmsNorm => !matrices.iter().any(|m| matches!(m, Matrix::O | Matrix::Down)),
            Prologue::SiluMul => matrices.iter().all(|m| *m == Matrix::Down),
        };
        ok &= fits || misplaced(name, &matrices, sink);
        prologue.push(p);
    }
    let mut epilogue: Vec<Epilogue> = Vec::new();
    for name in &l.epilogue {
        let Some(e) = by_name(name, "epilogue", &Epilogue::ALL, Epilogue::name, sink) else {
            ok = false;
            continue;
        };
        if epilogue.contains(&e) {
            sink.push(Diagnostic::error(name.span, format!("`{}` is given twice", e.name()), ""));
            ok = false;
        }
        let fits = match e {
            Epilogue::AddResidual => matrices.iter().all(|m| matches!(m, Matrix::O | Matrix::Down)),
        };
        ok &= fits || misplaced(name, &matrices, sink);
        epilogue.push(e);
    }
    ok.then_some(Launch { matrices, prologue, epilogue })
}

/// Always false.
fn misplaced(name: &Ident, matrices: &[Matrix], sink: &mut Sink) -> bool {
    let of: Vec<&str> = matrices.iter().map(|m| m.name()).collect();
    let d = Diagnostic::error(
        name.span,
        format!("`{}` does not belong to the launch of {}", name.name, of.join(" + ")),
        "",
    );
    sink.push(d.hint("rms_norm goes before q, k, v, gate and up; silu_mul before down; add_residual after o and down"));
    false
}

fn by_name<T: Copy>(name: &Ident, what: &str, all: &[T], text: fn(T) -> &'static str, sink: &mut Sink) -> Option<T> {
    match all.iter().find(|t| text(**t) == name.name) {
        Some(t) => Some(*t),
        None => sink.fail(unknown(&name.name, name.span, what, all.iter().map(|t| text(*t)))),
    }
}
