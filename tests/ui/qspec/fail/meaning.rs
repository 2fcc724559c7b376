use qp_macros::qspec;

fn main() {
    let _ = qspec! {
        family tcq(kv) {
            window 25
            vector 2
            step   kv
            block  3 x 128
            values i8 + 1/2
            unit   2 ^ -5
            table  t[8] = [1, 2, 3]
            decode w {
                let h = w * 0x9E3779B1
                t[h >> 29] ^ signs(h[28], g[27])
            }
            scale  row
            rotate hadamrd(seed = 0)
        }
        quantizer tcq_1.5 = tcq(3)
        quantizer htcq_1.75 = mix(tcq_1.5, tcq_2.0)
    };
}
