//! Every test that crosses crates, as one program: it is linked once, and its tests share the machine's cores.

mod allocation;
mod checkpoint;
mod conformance;
mod device_engine;
mod directories;
mod gguf;
mod gguf_architectures;
mod import;
mod import_packed;
mod ir;
mod made;
mod palette;
mod plan;
mod plans;
mod printed;
mod qspec;
mod quantized;
mod quantized_kinds;
mod random_model;
mod random_specs;
mod sensitivity;
mod sequences;
mod specs;
mod to_gguf;
mod unquantized;
mod written_out;
