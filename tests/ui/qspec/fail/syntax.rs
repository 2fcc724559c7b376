use qp_macros::qspec;

fn main() {
    let _ = qspec! {
        quantizer q {
            windw  16
            step
            block  2, 128
            decode w { let h = }
        }
        fusion f { lunch q }
    };
}
