//! Results of another type: a finished kernel whose stores to one buffer round.

use super::{Block, Elem, Kernel, Mem, Op, Param, ParamKind, Scalar, Stmt};

impl Kernel {
    /// The kernel with the buffer `name`, which it writes as `F32` and never reads, of elements `elem` (`F32`, `F16` or
    /// `BF16`): each result is rounded to the nearest as it is stored. `None` if the buffer is not such a one.
    pub fn storing(mut self, name: &str, elem: Elem) -> Option<Kernel> {
        let at = self.params.iter().position(|p| p.name == name)?;
        let mem = Mem::Global(at as u32);
        let reads = self.values.iter().any(|v| match v.op {
            Op::Load { mem: m, .. } | Op::AtomicAdd { mem: m, .. } => m == mem,
            _ => false,
        });
        let Param { kind: ParamKind::Buffer { elem: before, writable: true }, .. } = &mut self.params[at] else {
            return None;
        };
        if reads || *before != Elem::F32 || elem.scalar() != Scalar::F32 {
            return None;
        }
        *before = elem;
        change(&mut self.body, mem, elem);
        Some(self)
    }
}

fn change(block: &mut Block, to: Mem, wanted: Elem) {
    for statement in block {
        match statement {
            Stmt::Store { mem, elem, .. } if *mem == to => *elem = wanted,
            Stmt::If { cond: _, then, els } => {
                change(then, to, wanted);
                change(els, to, wanted);
            }
            Stmt::For { body, .. } => change(body, to, wanted),
            Stmt::Let(_)
            | Stmt::Set(..)
            | Stmt::Store { .. }
            | Stmt::Barrier
            | Stmt::ClusterBarrier
            | Stmt::WarpSync
            | Stmt::Fence
            | Stmt::Prefetch { .. }
            | Stmt::AsyncCopy { .. }
            | Stmt::AsyncCommit
            | Stmt::AsyncWait { .. }
            | Stmt::GroupFence
            | Stmt::GroupWait { .. }
            | Stmt::MmaGroup { .. }
            | Stmt::GridWait
            | Stmt::GridLaunch
            | Stmt::Comment(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::interpret::{Arg, Options, run};
    use crate::ir::{Builder, Special};

    #[test]
    fn results_are_rounded_as_they_are_stored() {
        let b = Builder::new("k", [1, 1], 32);
        let y = b.sized("y", Elem::F32, true, 32);
        let x = b.sized("x", Elem::F32, true, 32);
        let i = b.special(Special::Thread);
        b.if_(i.lt(20), || b.store(y, i, b.load(x, i, Elem::F32), Elem::F32));
        let kernel = b.finish();
        assert!(kernel.clone().storing("x", Elem::F16).is_none(), "it is read");
        assert!(kernel.clone().storing("z", Elem::F16).is_none() && kernel.clone().storing("y", Elem::I32).is_none());
        let kernel = kernel.storing("y", Elem::F16).unwrap();
        assert_eq!(kernel.least_bytes(0), 64);
        let numbers: Vec<f32> = (0..32).map(|i| 1.0 + i as f32 / 4099.0).collect();
        let (mut y, mut x) = (vec![0u8; 64], numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        run(&kernel, &mut [Arg::Buffer(&mut y), Arg::Buffer(&mut x)], &Options::default()).unwrap();
        let stored = y.chunks(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32());
        for (i, (stored, x)) in stored.zip(numbers).enumerate() {
            assert_eq!(stored, if i < 20 { half::f16::from_f32(x).to_f32() } else { 0.0 });
        }
    }
}
