//! Fusion patterns: which matrices of a transformer layer share one launch, and what is done before and after.

/// A linear layer of a transformer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Matrix {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Output projection of attention.
    O,
    /// Gate projection of the MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Down projection of the MLP.
    Down,
}

impl Matrix {
    /// All, in the order of a layer.
    pub const ALL: [Matrix; 7] = [Matrix::Q, Matrix::K, Matrix::V, Matrix::O, Matrix::Gate, Matrix::Up, Matrix::Down];

    /// Name in the language.
    pub fn name(self) -> &'static str {
        match self {
            Matrix::Q => "q",
            Matrix::K => "k",
            Matrix::V => "v",
            Matrix::O => "o",
            Matrix::Gate => "gate",
            Matrix::Up => "up",
            Matrix::Down => "down",
        }
    }

    /// What its input is; matrices of one launch share it.
    pub fn input(self) -> &'static str {
        match self {
            Matrix::Q | Matrix::K | Matrix::V => "the input of attention",
            Matrix::O => "the output of attention",
            Matrix::Gate | Matrix::Up => "the input of the MLP",
            Matrix::Down => "the hidden activations of the MLP",
        }
    }
}

/// What a launch does to its input before the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Prologue {
    /// Root-mean-square normalisation.
    RmsNorm,
    /// `silu(gate) × up`.
    SiluMul,
    /// The quantizer's rotation.
    Rotate,
}

impl Prologue {
    /// All, in the order in which they may stand.
    pub const ALL: [Prologue; 3] = [Prologue::RmsNorm, Prologue::SiluMul, Prologue::Rotate];

    /// Name in the language.
    pub fn name(self) -> &'static str {
        match self {
            Prologue::RmsNorm => "rms_norm",
            Prologue::SiluMul => "silu_mul",
            Prologue::Rotate => "rotate",
        }
    }
}

/// What a launch does to its output after the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Epilogue {
    /// Adds the output to the residual stream.
    AddResidual,
}

impl Epilogue {
    /// All.
    pub const ALL: [Epilogue; 1] = [Epilogue::AddResidual];

    /// Name in the language.
    pub fn name(self) -> &'static str {
        match self {
            Epilogue::AddResidual => "add_residual",
        }
    }
}

/// Matrices that are multiplied by one launch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// The matrices, one below the other; never empty.
    pub matrices: Vec<Matrix>,
    /// Before the product, in order.
    pub prologue: Vec<Prologue>,
    /// After the product, in order.
    pub epilogue: Vec<Epilogue>,
}

/// A partition of a layer's matrices into launches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fusion {
    /// Name.
    pub name: String,
    /// The launches, in the order of a layer. Each of [`Matrix::ALL`] is in exactly one.
    pub launches: Vec<Launch>,
}

impl Fusion {
    /// The launch that holds `matrix`.
    pub fn launch_of(&self, matrix: Matrix) -> Option<&Launch> {
        self.launches.iter().find(|l| l.matrices.contains(&matrix))
    }
}
