//! The tree of a `.qspec` file, as written: nothing is evaluated and every part knows its span.

use super::diag::Span;
use super::number::Rational;

/// A name and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ident {
    /// The name.
    pub name: String,
    /// Where it stands.
    pub span: Span,
}

/// A file.
#[derive(Clone, Debug, Default)]
pub struct File {
    /// In order.
    pub items: Vec<Item>,
    /// True if an item could not be read and is left out: names may be unknown for that reason.
    pub incomplete: bool,
}

/// What may stand at the top of a file.
#[derive(Clone, Debug)]
pub enum Item {
    /// `use "file.qspec"`
    Use(Use),
    /// `family name(parameters) { … }`
    Family(Family),
    /// `quantizer name = …` or `quantizer name { … }`
    Quantizer(Quantizer),
    /// `fusion name { … }`
    Fusion(Fusion),
}

/// Makes the families and quantizers of another file known.
#[derive(Clone, Debug)]
pub struct Use {
    /// Path, relative to this file's folder.
    pub path: Ident,
    /// The whole item.
    pub span: Span,
}

/// A quantizer with parameters.
#[derive(Clone, Debug)]
pub struct Family {
    /// Lines of `///` before it, without the slashes.
    pub doc: Vec<String>,
    /// Its name.
    pub name: Ident,
    /// Parameters: constants.
    pub params: Vec<Ident>,
    /// What it says.
    pub body: Body,
    /// The whole item.
    pub span: Span,
}

/// A quantizer.
#[derive(Clone, Debug)]
pub struct Quantizer {
    /// Lines of `///` before it, without the slashes.
    pub doc: Vec<String>,
    /// Its name.
    pub name: Ident,
    /// What it is.
    pub def: Definition,
    /// The whole item.
    pub span: Span,
}

/// What a quantizer is.
#[derive(Clone, Debug)]
pub enum Definition {
    /// `family(arguments)`
    Member {
        /// The family.
        family: Ident,
        /// One for each parameter.
        args: Vec<Expr>,
    },
    /// `mix(quantizer, quantizer, …)`
    Mix(Vec<Ident>),
    /// Written out.
    Body(Body),
}

/// Properties in braces.
#[derive(Clone, Debug)]
pub struct Body {
    /// In order.
    pub properties: Vec<Property>,
    /// With the braces.
    pub span: Span,
    /// True if a property could not be read and is left out: names and properties may be missing for that reason.
    pub incomplete: bool,
}

/// A property.
#[derive(Clone, Debug)]
pub struct Property {
    /// The keyword.
    pub keyword: Ident,
    /// What it says.
    pub kind: PropertyKind,
    /// The whole property.
    pub span: Span,
}

/// What a property says.
#[derive(Clone, Debug)]
pub enum PropertyKind {
    /// `let name = constant`
    Let(Ident, Expr),
    /// `window L`
    Window(Expr),
    /// `vector V`
    Vector(Expr),
    /// `step KV` or `step [KV, …]`
    Step(Expr),
    /// `block rows x columns`
    Block(Expr, Expr),
    /// `values i8` or `values i8 + 1/2`
    Values(Ident, Option<Expr>),
    /// `unit constant`
    Unit(Expr),
    /// `table name[entries] …`
    Table(Table),
    /// `decode window { … }`
    Decode(Decode),
    /// `scale row`
    Scale(Ident),
    /// `rotate none` or `rotate hadamard(seed = 0)`
    Rotate(Ident, Vec<Arg>),
    /// `code { … }`: one code of a mix.
    Code(Body),
}

/// `name = constant` in parentheses.
#[derive(Clone, Debug)]
pub struct Arg {
    /// Name.
    pub name: Ident,
    /// Value.
    pub value: Expr,
}

/// A table.
#[derive(Clone, Debug)]
pub struct Table {
    /// Its name.
    pub name: Ident,
    /// Number of entries.
    pub entries: Expr,
    /// Where its values come from.
    pub source: TableSource,
}

/// Where the values of a table come from.
#[derive(Clone, Debug)]
pub enum TableSource {
    /// `= [ … ]`
    Inline(Expr),
    /// `from "path"`
    File(Ident),
    /// `trained(…) in "path"`
    Trained {
        /// How to train.
        args: Vec<Arg>,
        /// The closing parenthesis or the keyword.
        args_span: Span,
        /// The file.
        path: Ident,
    },
}

/// `decode window { let … result }`
#[derive(Clone, Debug)]
pub struct Decode {
    /// Name of the window.
    pub window: Ident,
    /// Definitions in order.
    pub lets: Vec<(Ident, Expr)>,
    /// The entries.
    pub result: Expr,
}

/// Binary operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BinaryOp {
    /// `**`
    Pow,
    /// `*`
    Mul,
    /// `/`
    Div,
    /// `%`
    Rem,
    /// `+`
    Add,
    /// `-`
    Sub,
    /// `<<`
    Shl,
    /// `>>`
    Shr,
    /// `&`
    And,
    /// `^`
    Xor,
    /// `|`
    Or,
    /// `==`
    Eq,
    /// `!=`
    Ne,
    /// `<`
    Lt,
    /// `<=`
    Le,
    /// `>`
    Gt,
    /// `>=`
    Ge,
}

impl BinaryOp {
    /// The operator as written.
    pub fn text(self) -> &'static str {
        match self {
            BinaryOp::Pow => "**",
            BinaryOp::Mul => "*",
            BinaryOp::Div => "/",
            BinaryOp::Rem => "%",
            BinaryOp::Add => "+",
            BinaryOp::Sub => "-",
            BinaryOp::Shl => "<<",
            BinaryOp::Shr => ">>",
            BinaryOp::And => "&",
            BinaryOp::Xor => "^",
            BinaryOp::Or => "|",
            BinaryOp::Eq => "==",
            BinaryOp::Ne => "!=",
            BinaryOp::Lt => "<",
            BinaryOp::Le => "<=",
            BinaryOp::Gt => ">",
            BinaryOp::Ge => ">=",
        }
    }
}

/// Unary operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnaryOp {
    /// `-`
    Neg,
    /// `~`
    Not,
}

/// An expression: a constant, or in a decode block a word, a bit or a vector.
#[derive(Clone, Debug)]
pub struct Expr {
    /// What it is.
    pub kind: ExprKind,
    /// Where it stands.
    pub span: Span,
    /// Height of the tree; a number or name has 1.
    pub height: u32,
}

impl Expr {
    /// A node of the tree.
    pub fn new(kind: ExprKind, span: Span) -> Self {
        let height = 1 + match &kind {
            ExprKind::Number(_) | ExprKind::Name(_) => 0,
            ExprKind::Unary(_, a) => a.height,
            ExprKind::Binary(_, a, b) | ExprKind::Index(a, b) => a.height.max(b.height),
            ExprKind::Call(_, list) | ExprKind::List(list) => list.iter().map(|e| e.height).max().unwrap_or(0),
            ExprKind::If(a, b, c) => a.height.max(b.height).max(c.height),
        };
        Expr { kind, span, height }
    }
}

/// Kinds of expression.
#[derive(Clone, Debug)]
pub enum ExprKind {
    /// A number.
    Number(Rational),
    /// A name.
    Name(String),
    /// A unary operation.
    Unary(UnaryOp, Box<Expr>),
    /// A binary operation.
    Binary(BinaryOp, Box<Expr>, Box<Expr>),
    /// `base[index]`
    Index(Box<Expr>, Box<Expr>),
    /// `function(arguments)`
    Call(Ident, Vec<Expr>),
    /// `[a, b, …]`
    List(Vec<Expr>),
    /// `if condition then a else b`
    If(Box<Expr>, Box<Expr>, Box<Expr>),
}

/// A fusion pattern.
#[derive(Clone, Debug)]
pub struct Fusion {
    /// Lines of `///` before it, without the slashes.
    pub doc: Vec<String>,
    /// Its name.
    pub name: Ident,
    /// In order.
    pub launches: Vec<Launch>,
    /// The whole item.
    pub span: Span,
    /// True if a launch could not be read and is left out.
    pub incomplete: bool,
}

/// `launch q + k { prologue …  epilogue … }`
#[derive(Clone, Debug)]
pub struct Launch {
    /// The matrices.
    pub matrices: Vec<Ident>,
    /// Before the product.
    pub prologue: Vec<Ident>,
    /// After the product.
    pub epilogue: Vec<Ident>,
    /// The whole launch.
    pub span: Span,
}
