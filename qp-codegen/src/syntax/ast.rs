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
    /// `use "file.qspec"` or `use std`
    Use(Use),
    /// `family name(parameters) { … }`
    Family(Family),
    /// `quantizer name = …` or `quantizer name { … }`
    Quantizer(Quantizer),
    /// `fusion name { … }`
    Fusion(Fusion),
    /// `function name(parameters) { … }`
    Function(Function),
    /// `layout name of quantizer { … }`
    Layout(Layout),
}

/// A function of words, vectors and constants, expanded where it is called.
#[derive(Clone, Debug)]
pub struct Function {
    /// Lines of `///` before it, without the slashes.
    pub doc: Vec<String>,
    /// Its name.
    pub name: Ident,
    /// Names of its arguments.
    pub params: Vec<Ident>,
    /// Definitions in order.
    pub lets: Vec<(Ident, Expr)>,
    /// What a call gives.
    pub result: Expr,
    /// The whole item.
    pub span: Span,
}

/// Where someone's tensors keep the bits of a format.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Lines of `///` before it, without the slashes.
    pub doc: Vec<String>,
    /// Its name.
    pub name: Ident,
    /// The quantizer or family whose bits it places.
    pub of: Ident,
    /// In order.
    pub lines: Vec<LayoutLine>,
    /// The whole item.
    pub span: Span,
    /// True if a line could not be read and is left out.
    pub incomplete: bool,
}

/// A line of a layout.
#[derive(Clone, Debug)]
pub enum LayoutLine {
    /// `type 12`: the number by which a container calls this layout.
    Type(Ident, Expr),
    /// `tensor name : type[dimensions]`, or `record name[dimensions] { members }`.
    Tensor(TensorDecl),
    /// `target(variables) in place`
    Place(Box<Place>),
}

impl LayoutLine {
    /// Where the line stands.
    pub fn span(&self) -> Span {
        match self {
            LayoutLine::Type(keyword, value) => keyword.span.to(value.span),
            LayoutLine::Tensor(t) => t.span,
            LayoutLine::Place(p) => p.span,
        }
    }
}

/// A tensor of a layout.
#[derive(Clone, Debug)]
pub struct TensorDecl {
    /// `tensor` or `record`.
    pub keyword: Ident,
    /// Its name.
    pub name: Ident,
    /// Its sizes, outermost first.
    pub dims: Vec<Expr>,
    /// What an element is: one member without a name, or the members of a record.
    pub members: Vec<Member>,
    /// The whole line.
    pub span: Span,
}

/// A member of a record, or the element of a tensor.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name; nothing for the element of a tensor.
    pub name: Option<Ident>,
    /// Its type.
    pub ty: TypeName,
    /// How many there are.
    pub count: Option<Expr>,
    /// Where it stands.
    pub span: Span,
}

/// A type: `f16`, `u6`, or `u(n)`.
#[derive(Clone, Debug)]
pub struct TypeName {
    /// The name.
    pub name: Ident,
    /// The bits in parentheses.
    pub bits: Option<Expr>,
}

/// `target(variables)[a..b] - constant in place`
#[derive(Clone, Debug)]
pub struct Place {
    /// `code`, `stream`, or a field or table.
    pub target: Ident,
    /// Names of its indices.
    pub vars: Vec<Ident>,
    /// The name of a bit's number, of a stream: `stream(i, j)[b]`.
    pub bit_name: Option<Ident>,
    /// Which of its bits: all without it.
    pub bits: Option<(Expr, Expr)>,
    /// What is stored is less by this.
    pub less: Option<Expr>,
    /// The tensor.
    pub tensor: Ident,
    /// Its indices; nothing where bits run on along it (`*`).
    pub indices: Vec<Option<Expr>>,
    /// Member of a record, and its index.
    pub member: Option<(Ident, Option<Expr>)>,
    /// The first bit in the element.
    pub bit: Option<Expr>,
    /// `read b { … }`: what the element b says of the target. Such a place can be read only.
    pub read: Option<Decode>,
    /// The whole line.
    pub span: Span,
}

/// What a field covers.
#[derive(Clone, Debug)]
pub enum CoverExpr {
    /// `matrix`, `row` or `column`.
    Named(Ident),
    /// `flat N`: weights counted row by row.
    Flat(Ident, Expr),
    /// `R x C`
    Rectangle(Expr, Expr),
}

/// `field name : type per cover = formula`
#[derive(Clone, Debug)]
pub struct FieldDecl {
    /// Its name.
    pub name: Ident,
    /// Its type.
    pub ty: TypeName,
    /// What weights share one.
    pub cover: CoverExpr,
    /// How an encoder finds one.
    pub formula: Option<Expr>,
}

/// Makes the families and quantizers of another file known.
#[derive(Clone, Debug)]
pub struct Use {
    /// Path, relative to this file's folder, or the name of a library.
    pub path: Ident,
    /// True for a library that is built in.
    pub library: bool,
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
    /// `bits N` or `bits N for V`
    Bits(Expr, Option<Expr>),
    /// `field name : type per cover`
    Field(FieldDecl),
    /// `weight entry { … }`
    Weight(Decode),
    /// `order weight { … [row, column] }`
    Order(Decode),
    /// `input step, …`
    Input(Vec<Step>),
    /// `output step, …`
    Output(Vec<Step>),
}

/// A step of what is done to activations or results: `su`, `hadamard`, `hadamard(128)`, `signs(seed = 0)`, `permute(p)`.
#[derive(Clone, Debug)]
pub struct Step {
    /// A field, or what is done.
    pub name: Ident,
    /// An argument without a name.
    pub value: Option<Expr>,
    /// Arguments with names.
    pub args: Vec<Arg>,
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
    /// `: type per matrix`: each matrix has its own.
    OfMatrix(Box<(TypeName, CoverExpr)>),
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
            ExprKind::Range(a, b, c) | ExprKind::If(a, b, c) => a.height.max(b.height).max(c.height),
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
    /// `base[from..to]`: the bits from..to of a word.
    Range(Box<Expr>, Box<Expr>, Box<Expr>),
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
