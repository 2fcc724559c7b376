//! What `qspec!` and `include_qspec!` give. What they refuse is tested where they are, in `qp-macros`.

use qp_macros::{include_qspec, qspec};

#[test]
fn tokens_are_a_quantizer() {
    let q = qspec! {
        // comments are no tokens
        /// Documented.
        family tcq(kv) {
            let entries = max(2 ** 3, 2 ** (kv - 1))
            window 8
            vector 2
            step   kv
            block  2 x 128
            values i8 + 1/2
            unit   1/32
            table  t[entries] = [1, 2, 3, 4, 5, 6, 7, 8, -1, -2, -3, -4, -5, -6, -7, -8]
            decode w {
                let h = w * 0x9E3779B1 + ~w
                t[h >> 29] ^ signs(h[28], h[27])
            }
            scale  row
            rotate hadamard(seed = 0)
        }
        quantizer tcq_1.5 = tcq(3)
        quantizer tcq_2   = tcq(4)
        quantizer htcq_1.75 = mix(tcq_1.5, tcq_2)
    };
    assert_eq!(q.name, "htcq_1.75");
    assert_eq!(q.rate(), 1.75);
    assert_eq!(q.codes[0].tables[0].values[14..], [-7, -8]);
}

#[test]
fn a_literal_is_a_quantizer() {
    let q = qspec!(
        "quantizer q { window 2 vector 1 step 2 block 2 x 128 values i8 unit 1/2 table t[4] = [-3, -1, 1, 3] decode w { t[w] } scale row rotate none }"
    );
    assert_eq!(q.name, "q");
}

#[test]
fn files_are_found_beside_the_source() {
    let q = include_qspec!("../../specs/pass/include.qspec");
    assert_eq!(q.name, "two");
    let q = include_qspec!("../../specs/pass/include.qspec:one");
    assert_eq!((q.name.as_str(), q.rate()), ("one", 1.0));
}
