//! Where the bytes of a preparation go.

use super::{Emit, Group};
use crate::ir::{Elem, Mem, Scalar, V};
use crate::layout::CELL;

/// Of a lane's four columns of a group: the first plane of their cell, and their whole numbers' high and low bytes.
pub(super) type Whole<'b> = (V<'b>, [[V<'b>; 4]; 2]);

impl<'b> Emit<'_, 'b> {
    /// Stores the bytes of all groups of the warp.
    pub(super) fn store(&self, whole: &impl Fn(Group<'b>) -> Whole<'b>) {
        let (b, g, order) = (self.b, self.g, self.op.entering.and_then(|e| e.order));
        let one = |group: Group<'b>| {
            let (cell, planes) = whole(group);
            let Some(order) = order else {
                let at = cell * 4 + self.lane % 4;
                let [high, low] = planes.map(bytes);
                b.store(self.out.x, at, high, Elem::U32);
                return b.store(self.out.x, at + 4, low, Elem::U32);
            };
            self.store_in_order(cell, &order, planes);
        };
        // Where tokens are many, sectors written in parts take longer.
        if !g.in_registers() || order.is_some() || matches!(self.out.x, Mem::Shared(_)) {
            return self.each(one);
        }
        for k in (0..g.per_warp).step_by(2) {
            let [first, second] = [k, k + 1].map(|k| self.group(k));
            let alone = || if g.is_exact() { one(first) } else { b.if_(first.number.lt(g.groups), || one(first)) };
            let both = || self.store_two([whole(first), whole(second)]);
            match () {
                () if k + 1 == g.per_warp => alone(),
                () if g.is_exact() => both(),
                () => b.if_else(second.number.lt(g.groups), both, alone),
            }
        }
    }

    /// Stores the bytes of both planes of two groups, of which the lanes of a cell hold four columns each: each of the four takes all 16
    /// bytes of a plane of a group, so that a store has whole sectors of 32 bytes.
    fn store_two(&self, of: [Whole<'b>; 2]) {
        let b = self.b;
        let [(first, [a0, a1]), (second, [a2, a3])] = of.map(|(cell, planes)| (cell, planes.map(bytes)));
        let quad = self.lane & 3;
        let (odd, upper) = ((quad & 1).eq(1), quad.ge(2));
        // Lanes next to each other swap planes, those of both halves groups.
        let swapped = [odd.select(a0, a1), odd.select(a2, a3)].map(|v| v.shuffle_xor(1));
        let two = |mine: [V<'b>; 2], other| [odd.select(other, mine[0]), odd.select(mine[1], other)];
        let (low, high) = (two([a0, a1], swapped[0]), two([a2, a3], swapped[1]));
        let other = [0, 1].map(|i| upper.select(low[i], high[i]).shuffle_xor(2));
        let mine = [0, 1].map(|i| upper.select(high[i], low[i]));
        let words = [[other[0], mine[0]], [other[1], mine[1]], [mine[0], other[0]], [mine[1], other[1]]]
            .map(|[a, c]| upper.select(a, c));
        let at = upper.select(second, first) + (quad & 1);
        b.store(self.out.x, at * 4, b.vector(&words), Elem::U32);
    }

    /// Stores the bytes of both planes of four columns of a cell where an order has them.
    fn store_in_order(&self, cell: V<'b>, order: &[u8; CELL as usize], planes: [[V<'b>; 4]; 2]) {
        let b = self.b;
        let place =
            |column: u32| order.iter().position(|c| u32::from(*c) == column).expect("an order has all columns") as u32;
        // Whether columns 2k and 2k + 1 of all lanes lie side by side.
        let pairs = (0..8).all(|k| place(2 * k).is_multiple_of(2) && place(2 * k + 1) == place(2 * k) + 1);
        let size = if pairs { 2 } else { 1 };
        for k in (0..4).step_by(size) {
            // A byte for each of the four lanes of a cell.
            let places = (0..4).map(|quad| place(4 * quad + k as u32) << (8 * quad)).sum::<u32>();
            let quad = (self.lane & 3).bits(Scalar::U32) * 8;
            let at = ((b.u32(places) >> quad) & 0xff_u32).bits(Scalar::I32);
            for (plane, four) in (0..).zip(planes) {
                let at = (cell + plane) * (CELL as i32) + at;
                if pairs {
                    let two = (four[k].bits(Scalar::U32) & 0xff_u32) | (four[k + 1].bits(Scalar::U32) << 8);
                    b.store(self.out.x, at / 2, two, Elem::U16);
                } else {
                    b.store(self.out.x, at, four[k], Elem::I8);
                }
            }
        }
    }
}

/// The low bytes of four values, the first lowest.
fn bytes(v: [V<'_>; 4]) -> V<'_> {
    let [a, b, c, d] = v.map(|v| v.bits(Scalar::U32));
    a.permute(b, 0x0040).permute(c.permute(d, 0x0040), 0x5410)
}
