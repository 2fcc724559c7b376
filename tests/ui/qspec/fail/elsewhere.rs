use qp_macros::{include_qspec, qspec};

fn main() {
    let _ = include_qspec!("nowhere.qspec");
    let _ = include_qspec!("wrong.qspec");
    let _ = include_qspec!("../pass/codes.qspec:three");
    let _ = include_qspec!(3);
    let _ = qspec!("quantizer q { window 30 }");
    let _ = qspec! {};
    let _ = qspec! {
        quantizer q {
            window 2
            vector 1
            step   2
            block  2 x 128
            values i8
            unit   1/2
            table  t[4] trained(seed = 1, rounds = 8, samples = 2 ** 20) in "never_trained.table"
            decode w { t[w] }
            scale  row
            rotate none
        }
    };
}
