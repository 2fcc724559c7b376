//! Every operation against an independent scalar reference.

use super::*;

/// Words at which integer and float operations have their edges, and random ones.
fn edges() -> Vec<u32> {
    let mut out = vec![0, 1, 2, 3, 31, 255, 0x7fff_ffff, 0x8000_0000, 0x8000_0001, 0xffff_ffff, 0xffff_fffe, 0xffff];
    let floats =
        [0.5, -0.5, 1.5, 2.5, -1.0, 1e-40, -1e-45, 3e38, 1e10, -1e10, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    out.extend(floats.map(f32::to_bits));
    let mut r = Random(1);
    out.extend((0..23).map(|_| r.word()));
    out
}

fn pairs() -> Vec<[u32; 2]> {
    let edges = edges();
    edges.iter().flat_map(|a| edges.iter().map(|b| [*a, *b])).collect()
}

fn check<const N: usize>(
    what: &str,
    inputs: Vec<[u32; N]>,
    f: impl for<'b> Fn(&'b Builder, [V<'b>; N]) -> V<'b>,
    reference: impl Fn([u32; N]) -> u32,
) {
    for (input, got) in inputs.iter().zip(each(&inputs, f)) {
        let want = reference(*input);
        assert_eq!(got, want, "{what} of {input:x?}: got {got:x}, want {want:x}");
    }
}

#[test]
fn unsigned() {
    let all = pairs();
    let by = |f: fn(&u32) -> bool| all.iter().copied().filter(|[_, b]| f(b)).collect::<Vec<_>>();
    check("add", all.clone(), |_, [a, b]| a + b, |[a, b]| (u64::from(a) + u64::from(b)) as u32);
    check("sub", all.clone(), |_, [a, b]| a - b, |[a, b]| (i64::from(a) - i64::from(b)) as u32);
    check("mul", all.clone(), |_, [a, b]| a * b, |[a, b]| (u64::from(a) * u64::from(b)) as u32);
    check("div", by(|b| *b != 0), |_, [a, b]| a / b, |[a, b]| a / b);
    check("rem", by(|b| *b != 0), |_, [a, b]| a % b, |[a, b]| a - a / b * b);
    check("and", all.clone(), |_, [a, b]| a & b, |[a, b]| a & b);
    check("or", all.clone(), |_, [a, b]| a | b, |[a, b]| a | b);
    check("xor", all.clone(), |_, [a, b]| a ^ b, |[a, b]| (a | b) & !(a & b));
    check("shl", by(|b| *b < 32), |_, [a, b]| a << b, |[a, b]| (u64::from(a) << b) as u32);
    check("shr", by(|b| *b < 32), |_, [a, b]| a >> b, |[a, b]| (u64::from(a) >> b) as u32);
    check("min", all.clone(), |_, [a, b]| a.min(b), |[a, b]| if a < b { a } else { b });
    check("max", all.clone(), |_, [a, b]| a.max(b), |[a, b]| if a < b { b } else { a });
    check("not", all.clone(), |_, [a, _]| !a, |[a, _]| u32::MAX - a);
    check("less", all.clone(), |b, [x, y]| x.lt(y).select(b.u32(1), b.u32(0)), |[a, b]| (a < b).into());
    check("at least", all, |b, [x, y]| x.ge(y).select(b.u32(1), b.u32(0)), |[a, b]| (a >= b).into());
}

#[test]
fn signed() {
    let fits = |f: fn(i64, i64) -> Option<i64>| {
        let inside =
            move |p: &[u32; 2]| f((p[0] as i32).into(), (p[1] as i32).into()).is_some_and(|x| x as i32 as i64 == x);
        (pairs().into_iter().filter(inside).collect::<Vec<_>>(), move |[a, b]: [u32; 2]| {
            f((a as i32).into(), (b as i32).into()).unwrap() as u32
        })
    };
    macro_rules! signed {
        ($name:literal, $wide:expr, |$a:ident, $b:ident| $op:expr) => {
            let (inputs, reference) = fits($wide);
            assert!(inputs.len() > 50);
            let f = for_all(|$a, $b| $op);
            check($name, inputs, f, reference);
        };
    }
    fn for_all(f: impl for<'b> Fn(V<'b>, V<'b>) -> V<'b>) -> impl for<'b> Fn(&'b Builder, [V<'b>; 2]) -> V<'b> {
        move |_, [a, b]| f(a.bits(Scalar::I32), b.bits(Scalar::I32)).bits(Scalar::U32)
    }
    signed!("add", |a, b| Some(a + b), |a, b| a + b);
    signed!("sub", |a, b| Some(a - b), |a, b| a - b);
    signed!("mul", |a, b| Some(a * b), |a, b| a * b);
    signed!("div", |a, b| (b != 0).then(|| a / b), |a, b| a / b);
    signed!("rem", |a, b| (a >= 0 && b > 0).then(|| a % b), |a, b| a % b);
    signed!("shl", |a, b| (0..32).contains(&b).then(|| a << b), |a, b| a << b);
    signed!("shr", |a, b| (0..32).contains(&b).then(|| a >> b), |a, b| a >> b);
    signed!("min", |a, b| Some(a.min(b)), |a, b| a.min(b));
    signed!("max", |a, b| Some(a.max(b)), |a, b| a.max(b));
    signed!("and", |a, b| Some(a & b), |a, b| a & b);
    signed!("neg", |a, _| Some(-a), |a, _b| -a);
    signed!("abs", |a, _| Some(a.abs()), |a, _b| a.abs());
    check(
        "less",
        pairs(),
        |b, [x, y]| x.bits(Scalar::I32).lt(y.bits(Scalar::I32)).select(b.u32(1), b.u32(0)),
        |[a, b]| ((a as i32) < b as i32).into(),
    );
}

#[test]
fn wide() {
    fn long(v: V<'_>) -> V<'_> {
        v.bits(Scalar::I32).to(Scalar::I64)
    }
    let s = |a: u32| i64::from(a as i32);
    check(
        "product and shift",
        pairs(),
        |_, [a, b]| ((long(a) * long(b)) >> 13).to(Scalar::U32),
        |[a, b]| ((s(a) * s(b)) >> 13) as u32,
    );
    check(
        "sum and difference",
        pairs(),
        |_, [a, b]| ((long(a) + a.to(Scalar::I64)).max(long(b)) - (long(b) << 20)).to(Scalar::U32),
        |[a, b]| ((s(a) + i64::from(a)).max(s(b)) - (s(b) << 20)) as u32,
    );
    check(
        "choice",
        pairs(),
        |_, [a, b]| long(a).le(long(b)).select(-long(a), !long(b)).abs().to(Scalar::F32).bits(Scalar::U32),
        |[a, b]| (if s(a) <= s(b) { -s(a) } else { !s(b) }.abs() as f32).to_bits(),
    );
    check(
        "through a variable",
        pairs(),
        |b, [x, y]| {
            let v = b.var(long(x));
            b.if_(x.lt(y), || b.set(v, b.get(v) * 3));
            (b.get(v).abs() % 1_000_003).min(9999).to(Scalar::U32)
        },
        |[a, b]| {
            let x = if a < b { s(a) * 3 } else { s(a) };
            (x.abs() % 1_000_003).min(9999) as u32
        },
    );
}

#[test]
fn floats() {
    // Through `f64` the basic operations round twice, which is known to be harmless for them.
    let bits = |x: f64| {
        let x = x as f32;
        if x.is_nan() { 0x7fff_ffff } else { x.to_bits() }
    };
    let d = |a: u32| f64::from(f32::from_bits(a));
    macro_rules! float {
        ($name:literal, |$a:ident, $b:ident| $op:expr) => {
            fn op<'b>($a: V<'b>, $b: V<'b>) -> V<'b> {
                $op
            }
            check(
                $name,
                pairs(),
                |_, [a, b]| op(a.bits(Scalar::F32), b.bits(Scalar::F32)).bits(Scalar::U32),
                |[x, y]| {
                    let ($a, $b) = (d(x), d(y));
                    bits($op)
                },
            );
        };
    }
    {
        float!("add", |a, b| a + b);
    }
    {
        float!("sub", |a, b| a - b);
    }
    {
        float!("mul", |a, b| a * b);
    }
    {
        float!("div", |a, b| a / b);
    }
    check("sqrt", pairs(), |_, [a, _]| a.bits(Scalar::F32).sqrt().bits(Scalar::U32), |[a, _]| bits(d(a).sqrt()));
    let order = |less: bool| {
        move |[x, y]: [u32; 2]| {
            let (a, b) = (f32::from_bits(x), f32::from_bits(y));
            match (a.is_nan(), b.is_nan()) {
                (true, true) => 0x7fff_ffff,
                (true, false) => y,
                (false, true) => x,
                (false, false) if (a.total_cmp(&b) == std::cmp::Ordering::Less) == less => x,
                (false, false) => y,
            }
        }
    };
    check("min", pairs(), |_, [a, b]| a.bits(Scalar::F32).min(b.bits(Scalar::F32)).bits(Scalar::U32), order(true));
    check("max", pairs(), |_, [a, b]| a.bits(Scalar::F32).max(b.bits(Scalar::F32)).bits(Scalar::U32), order(false));
    check(
        "unordered",
        pairs(),
        |b, [x, y]| {
            let (x, y) = (x.bits(Scalar::F32), y.bits(Scalar::F32));
            (x.ne(y) & !x.lt(y) & !x.gt(y)).select(b.u32(1), b.u32(0))
        },
        |[x, y]| (d(x).is_nan() || d(y).is_nan()).into(),
    );
    // 1 + 2^-24 rounds to 1 in two steps, and to 1 + 2^-23 - ... when fused.
    let x = 1.0f32 + f32::EPSILON;
    let fused = each(&[[x.to_bits()]], |_, [a]| {
        let a = a.bits(Scalar::F32);
        a.fma(a, -1.0f32).bits(Scalar::U32)
    });
    assert_eq!(f32::from_bits(fused[0]), 2.0 * f32::EPSILON + f32::EPSILON * f32::EPSILON);
}

#[test]
fn conversions() {
    let all: Vec<[u32; 1]> = edges().into_iter().map(|x| [x]).collect();
    let f = |a: u32| f64::from(f32::from_bits(a));
    let round = |x: f64| if x.is_nan() { 0.0 } else { x.round_ties_even() };
    let clamp = move |a, lo: f64, hi: f64| round(f(a)).clamp(lo, hi);
    check(
        "f32 to i32",
        all.clone(),
        |_, [a]| a.bits(Scalar::F32).to(Scalar::I32).bits(Scalar::U32),
        |[a]| clamp(a, -2f64.powi(31), 2f64.powi(31) - 1.0) as i32 as u32,
    );
    check(
        "f32 to u32",
        all.clone(),
        |_, [a]| a.bits(Scalar::F32).to(Scalar::U32),
        |[a]| clamp(a, 0.0, 2f64.powi(32) - 1.0) as u32,
    );
    check(
        "f32 to i64",
        all.clone(),
        |_, [a]| (a.bits(Scalar::F32).to(Scalar::I64) >> 16).to(Scalar::U32),
        |[a]| (round(f(a)) as i64 >> 16) as u32,
    );
    check(
        "i32 to f32",
        all.clone(),
        |_, [a]| a.bits(Scalar::I32).to(Scalar::F32).bits(Scalar::U32),
        |[a]| (f64::from(a as i32) as f32).to_bits(),
    );
    check(
        "u32 to f32",
        all.clone(),
        |_, [a]| a.to(Scalar::F32).bits(Scalar::U32),
        |[a]| (f64::from(a) as f32).to_bits(),
    );
    check("bool to u32", all.clone(), |_, [a]| a.lt(9u32).to(Scalar::U32), |[a]| (a < 9).into());
    check("u32 to i64 to u32", all, |_, [a]| (a.to(Scalar::I64) + 1).to(Scalar::U32), |[a]| a.wrapping_add(1));
}

#[test]
fn bytes_of_words() {
    let all = pairs();
    fn prmt(selector: u32, a: u32, b: u32) -> u32 {
        let all: Vec<u8> = [a.to_le_bytes(), b.to_le_bytes()].concat();
        let pick = |nibble: u32| match all[nibble as usize % 8] {
            byte if nibble < 8 => u32::from(byte),
            byte => {
                if byte > 127 {
                    255
                } else {
                    0
                }
            }
        };
        (0..4).map(|i| pick(selector >> (4 * i) & 15) << (8 * i)).sum()
    }
    check("permute", all.clone(), |_, [a, b]| a.permute(b, 0x5140), |[a, b]| prmt(0x5140, a, b));
    check("signs", all.clone(), |_, [a, b]| a.permute(b, 0xFBE8), |[a, b]| prmt(0xFBE8, a, b));
    let mut r = Random(2);
    let triples: Vec<[u32; 3]> = all.iter().map(|[a, b]| [*a, *b, r.word() >> 8]).collect();
    check("permute_by", triples.clone(), |_, [a, b, c]| a.permute_by(b, c), |[a, b, c]| prmt(c & 0xffff, a, b));
    check(
        "funnel",
        triples.clone(),
        |_, [a, b, c]| a.funnel_shr(b, c),
        |[a, b, c]| {
            let bits = u64::from(b) << 32 | u64::from(a);
            (0..32).map(|i| ((bits >> (c % 32 + i) & 1) as u32) << i).sum()
        },
    );
    for high in [false, true] {
        check(
            "dot2",
            triples.clone(),
            move |_, [a, b, c]| a.dot2(b, high, c.bits(Scalar::I32)).bits(Scalar::U32),
            move |[a, b, c]| {
                let byte = |i: u32| i64::from((b >> (8 * i + if high { 16 } else { 0 })) as u8 as i8);
                let half = |i: u32| i64::from((a >> (16 * i)) as u16 as i16);
                (i64::from(c) + (0..2).map(|i| half(i) * byte(i)).sum::<i64>()) as u32
            },
        );
    }
    check(
        "dot4",
        triples,
        |_, [a, b, c]| a.dot4(b, c.bits(Scalar::I32)).bits(Scalar::U32),
        |[a, b, c]| {
            let byte = |x: u32, i: u32| i64::from((x >> (8 * i)) as u8 as i8);
            (i64::from(c) + (0..4).map(|i| byte(a, i) * byte(b, i)).sum::<i64>()) as u32
        },
    );
}

#[test]
fn halves_are_rounded_once_each() {
    // The high half has its operands the other way round.
    let in_words =
        |cases: &[[u32; 2]]| -> Vec<[u32; 2]> { cases.iter().map(|[a, b]| [a | b << 16, b | a << 16]).collect() };
    let differences = [
        // 1 - 1/2, 2^-24 - 2^-23, infinity - infinity, 1 - 2^-11, 1 - 2^-12 (a tie, to even), 2048 - 1/2 (too).
        ([0x3c00, 0x3800], [0x3800, 0xb800]),
        ([0x0001, 0x0002], [0x8001, 0x0001]),
        ([0x7c00, 0x7c00], [0x7fff, 0x7fff]),
        ([0x3c00, 0x1000], [0x3bff, 0xbbff]),
        ([0x3c00, 0x0c00], [0x3c00, 0xbc00]),
        ([0x6800, 0x3800], [0x6800, 0xe800]),
        ([0x7e01, 0x3c00], [0x7fff, 0x7fff]),
    ];
    let cases = in_words(&differences.map(|(case, _)| case));
    let find = |[a, _]: [u32; 2], of: &[([u32; 2], [u32; 2])]| {
        let (_, [low, high]) = of.iter().find(|(case, _)| a == case[0] | case[1] << 16).expect("a case");
        low | high << 16
    };
    check("sub", cases, |_, [a, b]| a.sub_halves(b), move |x| find(x, &differences));
    let products = [
        // 2^-12 by 2^-12, 2^-13, 1.5 2^-12, 2.5 2^-12: in 2^-24, 1, and the ties 1/2, 1 1/2, 2 1/2; 65504 by itself; a NaN.
        ([0x0c00, 0x0c00], 0x0001),
        ([0x0c00, 0x0800], 0x0000),
        ([0x0c00, 0x0e00], 0x0002),
        ([0x0c00, 0x1100], 0x0002),
        ([0x8a00, 0x0a00], 0x8001),
        ([0x7bff, 0x7bff], 0x7c00),
        ([0x7d00, 0x0000], 0x7fff),
    ];
    let products = products.map(|(case, product)| (case, [product; 2]));
    let cases = in_words(&products.map(|(case, _)| case));
    check("mul", cases, |_, [a, b]| a.mul_halves(b), move |x| find(x, &products));
    let mut r = Random(4);
    let triples: Vec<[u32; 3]> = pairs().iter().map(|[a, b]| [*a, *b, r.word()]).collect();
    check(
        "add_min",
        triples,
        |_, [a, b, c]| a.add_min(b, c),
        |[a, b, c]| {
            let low = (((a & 0xffff) + (b & 0xffff)) & 0xffff).min(c & 0xffff);
            let high = (((a >> 16) + (b >> 16)) & 0xffff).min(c >> 16);
            low | high << 16
        },
    );
}

#[test]
fn vectors_component_by_component() {
    let b = Builder::new("vectors", [1, 1], 32);
    let x = b.buffer("x", Elem::U32, true);
    let i = b.special(Special::Thread) * 4;
    let v = b.load_as(x, i, Elem::U32, 4, Cache::Default);
    let w = v * v + !v;
    let swapped = b.vector(&[w.lane(3), w.lane(2), v.lane(1), w.lane(0)]);
    let var = b.var(v);
    b.set(var, v.lane(0).lt(1000u32).select(swapped, b.get(var)));
    b.store(x, i, b.get(var), Elem::U32);
    let mut r = Random(3);
    let before: Vec<u32> = (0..128).map(|i| if i % 8 == 0 { r.word() } else { r.word() % 1000 }).collect();
    let mut memory = bytes(before.iter().copied());
    run(&b.finish(), &mut [Arg::Buffer(&mut memory)], &Options::default()).unwrap();
    let f = |x: u32| x.wrapping_mul(x).wrapping_add(!x);
    for (v, got) in before.chunks(4).zip(words(&memory).chunks(4)) {
        let want = if v[0] < 1000 { [f(v[3]), f(v[2]), v[1], f(v[0])] } else { [v[0], v[1], v[2], v[3]] };
        assert_eq!(got, want);
    }
}

#[test]
fn shuffles() {
    let b = Builder::new("shuffles", [1, 1], 64);
    let x = b.buffer("x", Elem::U32, true);
    let t = b.special(Special::Thread);
    let own = t.to(Scalar::U32);
    let turned = own.shuffle(t * 3 + 40);
    let swapped = own.shuffle_xor(21);
    b.store(x, t * 2, b.vector(&[turned, swapped]), Elem::U32);
    let mut memory = vec![0; 512];
    run(&b.finish(), &mut [Arg::Buffer(&mut memory)], &Options::default()).unwrap();
    for (t, got) in words(&memory).chunks(2).enumerate() {
        let warp = t / 32 * 32;
        assert_eq!(got, [(warp + (t * 3 + 40) % 32) as u32, (warp + ((t % 32) ^ 21)) as u32]);
    }
}

#[test]
fn values_across_lanes() {
    let mut r = Random(8);
    let b = Builder::new("across", [1, 1], 64);
    let x = b.buffer("x", Elem::U32, true);
    let t = b.special(Special::Thread);
    let own = b.load(x, t, Elem::U32);
    b.store(x, t * 2 + 64, b.vector(&[own.sum_across(), own.max_across()]), Elem::U32);
    let input: Vec<u32> = (0..64).map(|_| r.word()).collect();
    let mut memory = bytes(input.iter().copied().chain([0; 128]));
    run(&b.finish(), &mut [Arg::Buffer(&mut memory)], &Options::default()).unwrap();
    for (t, got) in words(&memory)[64..].chunks(2).enumerate() {
        let lanes = || input[t / 32 * 32..][..32].iter().copied();
        assert_eq!(got, [lanes().fold(0, u32::wrapping_add), lanes().max().unwrap()]);
    }
}

#[test]
fn products() {
    let mut r = Random(4);
    for signed_a in [true, false] {
        let b = Builder::new("mma", [1, 1], 64);
        let x = b.buffer("x", Elem::U32, false);
        let y = b.buffer("y", Elem::I32, true);
        let t = b.special(Special::Thread);
        let a = b.load_as(x, t * 8, Elem::U32, 4, Cache::ReadOnly).lanes().try_into().ok().unwrap();
        let bs = b.load_as(x, t * 8 + 4, Elem::U32, 2, Cache::ReadOnly).lanes().try_into().ok().unwrap();
        let acc = b.load_as(y, t * 4, Elem::I32, 4, Cache::Default);
        b.store(y, t * 4, b.mma_i8(signed_a, a, bs, acc), Elem::I32);
        let kernel = b.finish();
        let input: Vec<u32> = (0..64 * 8).map(|_| r.word()).collect();
        let before: Vec<i32> = (0..64 * 4).map(|_| r.word() as i32 >> 4).collect();
        let mut after = bytes(before.iter().map(|x| *x as u32));
        run(&kernel, &mut [Arg::ReadOnly(&bytes(input.iter().copied())), Arg::Buffer(&mut after)], &Options::default())
            .unwrap();
        let after = words(&after);
        for warp in 0..2 {
            // Where the PTX manual puts element i of each lane's fragments.
            let (mut a, mut b) = ([[0i32; 32]; 16], [[0i32; 8]; 32]);
            for lane in 0..32 {
                let (group, rest) = (lane >> 2, lane % 4);
                let byte = |i: usize| input[(warp * 32 + lane) * 8 + i / 4].to_le_bytes()[i % 4];
                for i in 0..16 {
                    let row = if i < 4 || (8..12).contains(&i) { group } else { group + 8 };
                    let column = rest * 4 + (i & 3) + if i >= 8 { 16 } else { 0 };
                    a[row][column] = if signed_a { (byte(i) as i8).into() } else { byte(i).into() };
                }
                for i in 0..8 {
                    let row = rest * 4 + (i & 3) + if i >= 4 { 16 } else { 0 };
                    b[row][group] = (byte(16 + i) as i8).into();
                }
            }
            for lane in 0..32 {
                for i in 0..4 {
                    let row = if i < 2 { lane >> 2 } else { (lane >> 2) + 8 };
                    let column = lane % 4 * 2 + (i & 1);
                    let at = (warp * 32 + lane) * 4 + i;
                    let want = before[at] + (0..32).map(|k| a[row][k] * b[k][column]).sum::<i32>();
                    assert_eq!(after[at] as i32, want, "lane {lane}, component {i}");
                }
            }
        }
    }
}

/// Two warp groups, each with a place of its own in B, against sums over where the PTX manual puts the operands.
#[test]
fn products_of_warp_groups() {
    let mut r = Random(9);
    for (signed_a, fresh, groups, steps) in
        [(true, false, 2, 1), (false, false, 1, 3), (true, false, 6, 2), (false, true, 2, 2)]
    {
        let columns = 8 * groups;
        // Sixteen bytes of K take `stride` cells, those of the second group begin 3 cells later.
        let (stride, later) = (columns + 5, 3);
        let cells = 2 * steps * stride + later;
        let b = Builder::new("group", [1, 1], 256);
        let x = b.buffer("x", Elem::U32, false);
        let w = b.buffer("w", Elem::U32, false);
        let y = b.buffer("y", Elem::I32, true);
        let s = b.shared("s", Elem::U32, cells * 4);
        let (t, warp) = (b.special(Special::Thread), b.special(Special::Warp));
        b.for_(t, cells, 256, |i| b.async_copy(s, i, x, i, 16));
        b.async_commit();
        b.async_wait(0);
        b.group_fence();
        b.barrier();
        let a: Vec<[V; 4]> = (0..steps)
            .map(|k| b.load_as(w, (t * steps + k) * 4, Elem::U32, 4, Cache::ReadOnly).lanes().try_into().ok().unwrap())
            .collect();
        let load = |j| b.load_as(y, (t * groups + j) * 4, Elem::I32, 4, Cache::Default);
        let acc: Vec<Var> = (0..groups).map(|j| b.var(load(j))).collect();
        // The first step apart: the others are added while it may still run.
        let (head, tail) = a.split_at(1);
        if fresh {
            b.mma_group_fresh(signed_a, head, &acc, s, warp / 4 * later, stride);
        } else {
            b.mma_group(signed_a, head, &acc, s, warp / 4 * later, stride);
        }
        if !tail.is_empty() {
            b.group_wait(1);
            b.mma_group(signed_a, tail, &acc, s, warp / 4 * later + 2 * stride, stride);
        }
        b.group_wait(0);
        acc.iter().zip(0u32..).for_each(|(&v, j)| b.store(y, (t * groups + j) * 4, b.get(v), Elem::I32));
        let kernel = b.finish();

        let xs: Vec<u8> = bytes((0..cells * 4).map(|_| r.word()));
        let ws: Vec<u8> = bytes((0..256 * steps * 4).map(|_| r.word()));
        let before: Vec<i32> = (0..256 * groups * 4).map(|_| r.word() as i32 >> 4).collect();
        let mut after = bytes(before.iter().map(|x| *x as u32));
        let mut args = [Arg::ReadOnly(&xs), Arg::ReadOnly(&ws), Arg::Buffer(&mut after)];
        run(&kernel, &mut args, &Options::default()).unwrap_or_else(|t| panic!("{t}\n{kernel}"));
        let after = words(&after);
        let byte_of_a = |group: u32, row: u32, k: u32| {
            // Register a0 is row g, bytes 4t; a1 row g + 8; a2, a3 the same 16 bytes on.
            let (warp, g, step, k) = (group * 4 + row / 16, row % 8, k / 32, k % 32);
            let (register, lane) = (row % 16 / 8 + k / 16 * 2, g * 4 + k % 16 / 4);
            let byte = ws[((((warp * 32 + lane) * steps + step) * 4 + register) * 4 + k % 4) as usize];
            if signed_a { i32::from(byte as i8) } else { byte.into() }
        };
        let byte_of_b = |group: u32, column: u32, k: u32| {
            let cell = group * later + k / 16 * stride + column;
            i32::from(xs[(cell * 16 + k % 16) as usize] as i8)
        };
        for group in 0..2 {
            for (row, column) in (0..64).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                let lane = row % 8 * 4 + column % 8 / 2;
                let thread = (group * 4 + row / 16) * 32 + lane;
                let component = column % 2 + row % 16 / 8 * 2;
                let at = ((thread * groups + column / 8) * 4 + component) as usize;
                let sum: i32 = (0..32 * steps).map(|k| byte_of_a(group, row, k) * byte_of_b(group, column, k)).sum();
                let before = if fresh { 0 } else { before[at] };
                assert_eq!(after[at] as i32, before + sum, "group {group}, row {row}, column {column}");
            }
        }
    }
}

#[test]
fn matrices_whose_rows_lanes_name() {
    for lanes in [2, 4] {
        let b = Builder::new("matrices", [1, 1], 64);
        let x = b.buffer("x", Elem::U32, false);
        let y = b.buffer("y", Elem::U32, true);
        let s = b.shared("s", Elem::U32, 64 * 4);
        let t = b.special(Special::Thread);
        b.store(s, t * 4, b.load_as(x, t * 4, Elem::U32, 4, Cache::ReadOnly), Elem::U32);
        b.barrier();
        // Rows in no order: lane l of both warps names row 63 − 2·l mod 64, where l names one at all.
        let row = ((t * -2 + 63) & 63) * 4;
        b.store(y, t * lanes, b.load_matrix(s, row, lanes), Elem::U32);
        let kernel = b.finish();
        let mut r = Random(6);
        let input: Vec<u32> = (0..64 * 4).map(|_| r.word()).collect();
        let mut out = vec![0; 64 * 4 * lanes as usize];
        run(&kernel, &mut [Arg::ReadOnly(&bytes(input.iter().copied())), Arg::Buffer(&mut out)], &Options::default())
            .unwrap();
        for (at, got) in words(&out).into_iter().enumerate() {
            let (t, matrix) = (at / lanes as usize, at % lanes as usize);
            let namer = t / 32 * 32 + 8 * matrix + t % 32 / 4;
            let row = (64 + 63 - 2 * namer as i32).rem_euclid(64) as usize;
            assert_eq!(got, input[row * 4 + t % 4], "thread {t}, matrix {matrix}");
        }
    }
}

#[test]
fn memory_of_every_element_and_width() {
    use Elem::{BF16, F16, F32, I8, I16, I32, U8, U16, U32};
    let mut r = Random(5);
    let input: Vec<u8> = bytes((0..256).map(|_| r.word()));
    for elem in [I8, U8, I16, U16, I32, U32, F16, BF16, F32] {
        for lanes in [1, 2, 4] {
            let through_shared = lanes != 2;
            let b = Builder::new("copy", [1, 1], 32);
            let x = b.buffer("x", Elem::U8, false);
            let y = b.buffer("y", Elem::U8, true);
            let wide = b.buffer("wide", Elem::U32, true);
            let s = b.shared("s", Elem::U32, 256);
            let t = b.special(Special::Thread);
            let mut v = b.load_as(x, t * lanes as i32, elem, lanes, Cache::Stream);
            if through_shared {
                b.store(s, t * lanes as i32, v, elem);
                v = b.load_as(s, t * lanes as i32, elem, lanes, Cache::Default);
            }
            b.store(y, t * lanes as i32, v, elem);
            for (i, part) in v.lanes().into_iter().enumerate() {
                b.store(wide, t * lanes as i32 + i as i32, part.bits(Scalar::U32), U32);
            }
            let (mut out, mut widened) = (vec![0; 1024], vec![0; 1024]);
            let mut args = [Arg::ReadOnly(&input), Arg::Buffer(&mut out), Arg::Buffer(&mut widened)];
            run(&b.finish(), &mut args, &Options::default()).unwrap();
            let n = (32 * lanes) as usize;
            let width = elem.bytes() as usize;
            for i in 0..n {
                let p = &input[i * width..(i + 1) * width];
                let want = match elem {
                    I8 => p[0] as i8 as u32,
                    U8 => p[0].into(),
                    I16 => i16::from_le_bytes([p[0], p[1]]) as u32,
                    U16 => u16::from_le_bytes([p[0], p[1]]).into(),
                    F16 => half::f16::from_le_bytes([p[0], p[1]]).to_f32().to_bits(),
                    BF16 => u32::from(u16::from_le_bytes([p[0], p[1]])) << 16,
                    I32 | U32 | F32 => u32::from_le_bytes([p[0], p[1], p[2], p[3]]),
                };
                let got = words(&widened)[i];
                let nan = matches!(elem, F16 | BF16) && f32::from_bits(want).is_nan();
                assert!(got == want || (nan && f32::from_bits(got).is_nan()), "{elem} x {lanes}: {got:x} for {want:x}");
                assert!(nan || out[i * width..(i + 1) * width] == *p, "{elem} x {lanes} back");
            }
        }
    }
}

#[test]
fn narrowing_rounds_to_even_and_truncates() {
    let narrowed = |elem: Elem, x: f32| {
        let b = Builder::new("narrow", [1, 1], 32);
        let y = b.buffer("y", elem, true);
        let v = b.f32(x);
        b.store(y, b.special(Special::Thread), v, elem);
        let mut out = vec![0; 64];
        run(&b.finish(), &mut [Arg::Buffer(&mut out)], &Options::default()).unwrap();
        u16::from_le_bytes([out[0], out[1]])
    };
    // 1 + 2^-11 and 1 + 3·2^-11 lie halfway between halves.
    assert_eq!(narrowed(Elem::F16, 1.0 + 0.5 / 1024.0), 0x3c00);
    assert_eq!(narrowed(Elem::F16, 1.0 + 1.5 / 1024.0), 0x3c02);
    assert_eq!(narrowed(Elem::F16, 1e6), 0x7c00);
    assert_eq!(narrowed(Elem::F16, 6e-8), 0x0001);
    assert_eq!(narrowed(Elem::F16, f32::NAN), 0x7fff);
    assert_eq!(narrowed(Elem::BF16, 1.0 + 0.5 / 128.0), 0x3f80);
    assert_eq!(narrowed(Elem::BF16, 1.0 + 1.5 / 128.0), 0x3f82);
    assert_eq!(narrowed(Elem::BF16, f32::NAN), 0x7fff);
}

#[test]
fn divergent_loops_and_branches() {
    let n = 64;
    let b = Builder::new("collatz", [1, 1], n);
    let x = b.buffer("x", Elem::I32, true);
    let t = b.special(Special::Thread);
    let (value, steps) = (b.var(t + 1), b.var(b.i32(0)));
    b.for_(0, t * 2, 1, |_| {
        b.if_(b.get(value).ne(1), || {
            let v = b.get(value);
            b.if_else((v & 1).eq(0), || b.set(value, v / 2), || b.set(value, v * 3 + 1));
            b.set(steps, b.get(steps) + 1);
        });
    });
    b.store(x, t, b.get(steps), Elem::I32);
    let mut out = vec![0; 256];
    run(&b.finish(), &mut [Arg::Buffer(&mut out)], &Options::default()).unwrap();
    for (t, got) in words(&out).into_iter().enumerate() {
        let (mut v, mut steps) = (t + 1, 0);
        while v != 1 && steps < t * 2 {
            v = if v % 2 == 0 { v / 2 } else { v * 3 + 1 };
            steps += 1;
        }
        assert_eq!(got as usize, steps, "thread {t}");
    }
}

#[test]
fn atomics_give_old_values_and_sum_over_blocks() {
    let b = Builder::new("count", [5, 3], 64);
    let x = b.buffer("x", Elem::U32, true);
    let seen = b.shared("seen", Elem::I32, 1);
    let t = b.special(Special::Thread);
    b.if_(t.eq(0), || b.store(seen, t, b.i32(0), Elem::I32));
    b.barrier();
    let old = b.atomic_add(seen, b.i32(0), b.i32(2));
    b.atomic_add(x, old / 2 + 1, b.u32(1));
    b.barrier();
    b.if_(t.eq(63), || {
        let all = b.load(seen, b.i32(0), Elem::I32);
        b.atomic_add(x, b.i32(0), all.bits(Scalar::U32));
    });
    let kernel = b.finish();
    let mut out = vec![0; 65 * 4];
    let report = run(&kernel, &mut [Arg::Buffer(&mut out)], &Options::default()).unwrap();
    let got = words(&out);
    assert_eq!(got[0], 15 * 128);
    assert!(got[1..].iter().all(|x| *x == 15));
    assert_eq!(report.count(interpret::OpKind::Atomic), 15 * (64 + 64 + 1));
    assert_eq!(report.global_stored, 15 * 65 * 4);
}
