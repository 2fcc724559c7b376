//! The decode block: names, types and constants of its expressions become nodes of an [`expr::Decode`].

mod graph;

pub use graph::renumber;

use super::Sink;
use super::consts::{self, Const, Scope};
use crate::spec::Table;
use crate::spec::expr::{Decode, Node, Op, Type, VectorOp, WordOp};
use crate::syntax::ast::{self, BinaryOp, Expr, ExprKind, Ident, UnaryOp};
use crate::syntax::diag::{Diagnostic, Span};
use graph::{are_numbers, normal};

/// Functions of a decode block beside those of constants.
const FUNCTIONS: [&str; 6] = ["byte", "sum_bytes", "signs", "parity", "count", "negate"];

/// Most functions that are inside of each other when they are expanded.
const MOST_CALLS_DEEP: usize = 16;
/// Most functions that are expanded in a block.
const MOST_CALLS: usize = 10_000;

/// Most operations of a decode block, those included that its result does not need.
const MOST_OPERATIONS: usize = 1000;

/// The value of an expression.
#[derive(Clone, Debug)]
enum Value {
    Const(Const),
    Node(Node),
}

struct Let {
    name: Ident,
    /// Nothing if its expression was wrong.
    value: Option<Value>,
    used: bool,
}

/// Checks a decode block.
pub struct Checker<'a> {
    /// L, if known.
    pub window: Option<u32>,
    /// V, if known.
    pub vector: Option<u32>,
    /// The code's tables, with their places.
    pub tables: &'a [(Table, Span)],
    /// How many of them are the code's; the others are of a matrix, and their entries are numbers.
    pub own_tables: usize,
    /// Functions that may be called.
    pub functions: &'a [&'a ast::Function],
    /// Constants.
    pub scope: &'a Scope,
    /// Errors.
    pub sink: &'a mut Sink,
    state: State,
}

#[derive(Default)]
struct State {
    decode: Decode,
    window_name: Option<Ident>,
    window_used: bool,
    lets: Vec<Let>,
    looked_up: Vec<bool>,
    /// Spans of the calls that are being expanded, and how many were.
    calls: Vec<Span>,
    expanded: usize,
}

/// The checked expression and which tables it looks up.
pub struct Checked {
    /// In its normal form: only what the result needs, in order of first need.
    pub decode: Decode,
    /// For each table whether the block looks it up.
    pub looked_up: Vec<bool>,
}

impl<'a> Checker<'a> {
    /// A checker for a code with these properties.
    pub fn new(
        window: Option<u32>,
        vector: Option<u32>,
        tables: &'a [(Table, Span)],
        own_tables: usize,
        functions: &'a [&'a ast::Function],
        scope: &'a Scope,
        sink: &'a mut Sink,
    ) -> Self {
        let state = State { looked_up: vec![false; tables.len()], ..State::default() };
        Checker { window, vector, tables, own_tables, functions, scope, sink, state }
    }

    /// Checks the block.
    pub fn check(mut self, d: &ast::Decode) -> Option<Checked> {
        self.clash(&d.window);
        self.state.window_name = Some(d.window.clone());
        let mut ok = true;
        for (name, e) in &d.lets {
            let value = self.expr(e);
            ok &= value.is_some();
            if !self.clash(name) {
                ok = false;
                continue;
            }
            if let Some(v) = &value {
                let text = match v {
                    Value::Const(c) => c.text(),
                    Value::Node(_) => self.type_of(v).to_string(),
                };
                self.sink.fact(name.span, || text);
            }
            self.state.lets.push(Let { name: name.clone(), value, used: false });
        }
        let result = self.vector_of(&d.result);
        // With an error, what would have used a name may be what failed.
        let ok = ok && result.is_some();
        for l in self.state.lets.iter().filter(|l| ok && !l.used) {
            let w = Diagnostic::warning(l.name.span, format!("`{}` is never used", l.name.name), "");
            self.sink.push(w.hint("take it out"));
        }
        if ok && !self.state.window_used {
            self.sink.push(
                Diagnostic::warning(d.window.span, "the window is never used", "")
                    .hint("without it every weight decodes to the same entry"),
            );
        }
        let result = result.filter(|_| ok)?;
        if self.state.looked_up[self.own_tables..].contains(&true)
            && !are_numbers(&self.state.decode, result, self.own_tables)
        {
            let message = "numbers of a matrix's tables are joined with each other alone, by `+`, `-` and `negate`";
            let d = Diagnostic::error(d.result.span, message, "");
            return self.sink.fail(d.hint("all entries are such numbers; the weight block adds others and scales"));
        }
        Some(Checked { decode: normal(&self.state.decode, result), looked_up: self.state.looked_up })
    }

    /// Reports a name that is taken.
    fn clash(&mut self, name: &Ident) -> bool {
        let taken = self.state.lets.iter().find(|l| l.name.name == name.name).map(|l| l.name.span);
        let taken = taken.or(self.state.window_name.as_ref().filter(|w| w.name == name.name).map(|w| w.span));
        let taken = taken.or(self.tables.iter().find(|t| t.0.name == name.name).map(|t| t.1));
        let Some(first) = taken.or(self.scope.span(&name.name)) else { return true };
        let d = Diagnostic::error(name.span, format!("`{}` is defined twice", name.name), "again here");
        self.sink.push(d.label(first, "first here").hint("choose another name: a name means one thing"));
        false
    }

    fn push(&mut self, op: Op) -> Option<Value> {
        if self.state.decode.nodes.len() == MOST_OPERATIONS {
            let at = self.state.window_name.as_ref().map(|w| w.span).unwrap_or_default();
            let d = Diagnostic::error(at, format!("the decode block has more than {MOST_OPERATIONS} operations"), "");
            return self.sink.fail(d.hint("a kernel has all of them for each step: use a table instead"));
        }
        Some(Value::Node(self.state.decode.push(op)))
    }

    fn node(&mut self, op: Op) -> Option<Node> {
        match self.push(op)? {
            Value::Node(n) => Some(n),
            Value::Const(_) => None,
        }
    }

    fn constant(&mut self, c: u32) -> Option<Node> {
        self.node(Op::Const(c))
    }

    /// The word of bits `from..to` of a word.
    fn bits(&mut self, word: Node, from: u32, to: u32) -> Option<Node> {
        let shifted = match from {
            0 => word,
            _ => {
                let by = self.constant(from)?;
                self.node(Op::Binary(WordOp::Shr, word, by))?
            }
        };
        if to == 32 {
            return Some(shifted);
        }
        let mask = self.constant(crate::spec::mask(to - from))?;
        self.node(Op::Binary(WordOp::And, shifted, mask))
    }

    /// The same word for each entry.
    fn each(&mut self, word: Node) -> Option<Node> {
        let v = self.vector?;
        self.node(Op::Pack(vec![word; v as usize]))
    }

    /// The vector whose entries are negated.
    fn negated(&mut self, vector: Node) -> Option<Node> {
        let (ones, one) = (self.constant(u32::MAX)?, self.constant(1)?);
        let (ones, one) = (self.each(ones)?, self.each(one)?);
        let complement = self.node(Op::Vector(VectorOp::Xor, vector, ones))?;
        self.node(Op::Vector(VectorOp::Add, complement, one))
    }

    fn type_of(&self, v: &Value) -> &'static str {
        match v {
            Value::Const(c) => c.describe(),
            Value::Node(n) => match self.state.decode.op(*n).ty() {
                Type::Word => "a word",
                Type::Bit => "a bit",
                Type::Vector => "a vector",
            },
        }
    }

    fn node_of(&mut self, e: &Expr, ty: Type) -> Option<Node> {
        let v = self.expr(e)?;
        self.coerce(v, e.span, ty)
    }

    fn coerce(&mut self, v: Value, span: Span, ty: Type) -> Option<Node> {
        match (&v, ty) {
            (Value::Node(n), _) if self.state.decode.op(*n).ty() == ty => return Some(*n),
            (Value::Const(Const::Number(n)), Type::Word) => {
                let word = n.integer().filter(|i| (i128::from(i32::MIN)..=i128::from(u32::MAX)).contains(i));
                let Some(word) = word else {
                    let d = Diagnostic::error(span, format!("{n} is no 32-bit word"), "");
                    return self.sink.fail(d);
                };
                return Some(self.state.decode.push(Op::Const(word as u32)));
            }
            // A bit is a word of 0 or 1, and a word's bit is its lowest.
            (Value::Node(n), Type::Word) if self.state.decode.op(*n).ty() == Type::Bit => {
                let Op::Bit(word, i) = *self.state.decode.op(*n) else { unreachable!("bits are bits of words") };
                return self.bits(word, i, i + 1);
            }
            (Value::Node(n), Type::Bit) if self.state.decode.op(*n).ty() == Type::Word => {
                return self.node(Op::Bit(*n, 0));
            }
            _ => (),
        }
        let (wanted, hint) = match ty {
            Type::Word => ("a word", "a vector has no bits of its own"),
            Type::Bit => ("a bit", "bit i of a word h is `h[i]`"),
            Type::Vector => ("a vector", "a vector is a table entry `t[i]`, `signs(…)`, or words in brackets"),
        };
        let found = self.type_of(&v);
        let d = Diagnostic::error(span, format!("expected {wanted}, found {found}"), format!("this is {found}"));
        self.sink.fail(d.hint(hint))
    }

    fn word(&mut self, e: &Expr) -> Option<Node> {
        self.node_of(e, Type::Word)
    }

    fn vector_of(&mut self, e: &Expr) -> Option<Node> {
        self.node_of(e, Type::Vector)
    }

    fn expr(&mut self, e: &Expr) -> Option<Value> {
        match &e.kind {
            ExprKind::Number(n) => Some(Value::Const(Const::Number(*n))),
            ExprKind::Name(name) => self.name(name, e.span),
            ExprKind::Unary(op, a) => match self.expr(a)? {
                Value::Const(Const::Number(n)) => consts::fold_unary(*op, n, e.span, self.sink).map(Value::Const),
                v => {
                    if *op == UnaryOp::Neg
                        && let Value::Node(n) = v
                        && is_vector_node(&self.state.decode, &v)
                    {
                        return self.negated(n).map(Value::Node);
                    }
                    let a = self.coerce(v, a.span, Type::Word)?;
                    match op {
                        UnaryOp::Not => self.push(Op::Not(a)),
                        UnaryOp::Neg => {
                            let zero = self.state.decode.push(Op::Const(0));
                            self.push(Op::Binary(WordOp::Sub, zero, a))
                        }
                    }
                }
            },
            ExprKind::Binary(op, a, b) => self.binary(*op, a, b, e.span),
            ExprKind::Index(base, index) => self.index(base, index),
            ExprKind::Range(base, from, to) => self.range(base, from, to),
            ExprKind::Call(f, args) => self.call(f, args, e.span),
            ExprKind::List(list) => {
                self.count(list.len(), "a list", "word", e.span);
                let words: Vec<_> = list.iter().map(|e| self.word(e)).collect();
                let words = words.into_iter().collect::<Option<_>>()?;
                self.right_count(list.len())?;
                self.push(Op::Pack(words))
            }
            ExprKind::If(c, a, b) => {
                self.use_names(a);
                self.use_names(b);
                if let Some((name, span)) = self.computed_name(c) {
                    let d = Diagnostic::error(span, format!("`if` chooses by constants, and `{name}` is none"), "");
                    let cure = "what is chosen by the window is looked up in a table, or cut out with a mask";
                    return self.sink.fail(d.label(c.span, "the condition").hint(cure));
                }
                if self.state.calls.is_empty() {
                    let chosen = consts::choose(c, a, b, self.scope, self.sink)?;
                    return self.expr(chosen);
                }
                match self.expr(c)? {
                    Value::Const(Const::Condition(true)) => self.expr(a),
                    Value::Const(Const::Condition(false)) => self.expr(b),
                    other => {
                        let found = self.type_of(&other);
                        let d = Diagnostic::error(c.span, format!("expected a condition, found {found}"), "");
                        self.sink.fail(d.hint("`if` chooses by constants; use a table or a mask for words"))
                    }
                }
            }
        }
    }

    /// A name in `e` whose value is computed from the window.
    fn computed_name(&self, e: &Expr) -> Option<(String, Span)> {
        let all = |list: &[&Expr]| list.iter().find_map(|e| self.computed_name(e));
        match &e.kind {
            ExprKind::Number(_) => None,
            ExprKind::Name(n) => {
                let is_window = self.state.window_name.as_ref().is_some_and(|w| w.name == *n);
                let is_node = |l: &Let| l.name.name == *n && matches!(l.value, Some(Value::Node(_)));
                (is_window || self.state.lets.iter().any(is_node)).then(|| (n.clone(), e.span))
            }
            ExprKind::Unary(_, a) => self.computed_name(a),
            ExprKind::Binary(_, a, b) | ExprKind::Index(a, b) => all(&[a, b]),
            ExprKind::Call(_, l) | ExprKind::List(l) => l.iter().find_map(|e| self.computed_name(e)),
            ExprKind::Range(a, b, c) | ExprKind::If(a, b, c) => all(&[a, b, c]),
        }
    }

    /// Names of a branch that may not be taken count as used.
    fn use_names(&mut self, e: &Expr) {
        match &e.kind {
            ExprKind::Number(_) => (),
            ExprKind::Name(n) => {
                self.state.lets.iter_mut().filter(|l| l.name.name == *n).for_each(|l| l.used = true);
            }
            ExprKind::Unary(_, a) => self.use_names(a),
            ExprKind::Binary(_, a, b) | ExprKind::Index(a, b) => {
                self.use_names(a);
                self.use_names(b);
            }
            ExprKind::Call(_, l) | ExprKind::List(l) => l.iter().for_each(|e| self.use_names(e)),
            ExprKind::Range(a, b, c) | ExprKind::If(a, b, c) => [a, b, c].into_iter().for_each(|e| self.use_names(e)),
        }
    }

    fn name(&mut self, name: &str, span: Span) -> Option<Value> {
        if self.state.window_name.as_ref().is_some_and(|w| w.name == name) {
            self.state.window_used = true;
            return self.push(Op::Window);
        }
        if let Some(l) = self.state.lets.iter_mut().find(|l| l.name.name == name) {
            l.used = true;
            return l.value.clone();
        }
        if !self.state.calls.is_empty() {
            let known: Vec<String> = self.state.lets.iter().map(|l| l.name.name.clone()).collect();
            let d = consts::unknown(name, span, "name", known.iter().map(String::as_str));
            return self.sink.fail(d.hint("a function knows its parameters and its own names alone"));
        }
        if let Some(value) = self.scope.get(name) {
            return value.cloned().map(Value::Const);
        }
        if self.tables.iter().any(|t| t.0.name == name) {
            let d = Diagnostic::error(span, format!("the table `{name}` needs an index"), "");
            return self.sink.fail(d.hint(format!("an entry is `{name}[index]`, without a space")));
        }
        if self.scope.lenient {
            return None;
        }
        let known = self.state.lets.iter().map(|l| l.name.name.as_str());
        let known = known.chain(self.state.window_name.iter().map(|w| w.name.as_str()));
        let known: Vec<&str> =
            known.chain(self.tables.iter().map(|t| t.0.name.as_str())).chain(self.scope.names()).collect();
        let d = consts::unknown(name, span, "name", known.into_iter());
        self.sink.fail(d)
    }

    fn binary(&mut self, op: BinaryOp, a: &Expr, b: &Expr, span: Span) -> Option<Value> {
        let (va, vb) = (self.expr(a), self.expr(b));
        let (va, vb) = (va?, vb?);
        if let (Value::Const(x), Value::Const(y)) = (&va, &vb) {
            let (Const::Number(x), Const::Number(y)) = (x, y) else {
                return self.sink.fail(Diagnostic::error(span, format!("`{}` takes numbers", op.text()), ""));
            };
            return consts::fold(op, *x, *y, span, self.sink).map(Value::Const);
        }
        if is_vector_node(&self.state.decode, &va) || is_vector_node(&self.state.decode, &vb) {
            let (vector_op, negative) = match op {
                BinaryOp::Xor => (VectorOp::Xor, false),
                BinaryOp::Add => (VectorOp::Add, false),
                BinaryOp::Sub => (VectorOp::Add, true),
                _ => {
                    let d = Diagnostic::error(span, format!("vectors have no operator `{}`", op.text()), "");
                    return self.sink.fail(d.hint("vectors are joined with `^`, `+` and `-`"));
                }
            };
            let mut sides = [va, vb].into_iter().zip([a.span, b.span]).map(|(v, span)| {
                // A word is added to each entry.
                let joins = op != BinaryOp::Xor && !is_vector_node(&self.state.decode, &v);
                if !joins {
                    return self.coerce(v, span, Type::Vector);
                }
                let word = self.coerce(v, span, Type::Word)?;
                self.each(word)
            });
            let (na, nb) = (sides.next().flatten(), sides.next().flatten());
            let (na, nb) = (na?, nb?);
            let nb = if negative { self.negated(nb)? } else { nb };
            return self.push(Op::Vector(vector_op, na, nb));
        }
        let word_op = match op {
            BinaryOp::Add => WordOp::Add,
            BinaryOp::Sub => WordOp::Sub,
            BinaryOp::Mul => WordOp::Mul,
            BinaryOp::And => WordOp::And,
            BinaryOp::Or => WordOp::Or,
            BinaryOp::Xor => WordOp::Xor,
            BinaryOp::Shl => WordOp::Shl,
            BinaryOp::Shr => WordOp::Shr,
            BinaryOp::Pow
            | BinaryOp::Div
            | BinaryOp::Rem
            | BinaryOp::Eq
            | BinaryOp::Ne
            | BinaryOp::Lt
            | BinaryOp::Le
            | BinaryOp::Gt
            | BinaryOp::Ge => {
                let d = Diagnostic::error(span, format!("words have no operator `{}`", op.text()), "");
                return self.sink.fail(d.hint("words have + - * & | ^ ~ << >>; the others are for constants"));
            }
        };
        let (na, nb) = (self.coerce(va, a.span, Type::Word), self.coerce(vb, b.span, Type::Word));
        self.push(Op::Binary(word_op, na?, nb?))
    }

    fn range(&mut self, base: &Expr, from: &Expr, to: &Expr) -> Option<Value> {
        let v = self.expr(base)?;
        let word = self.coerce(v, base.span, Type::Word);
        let mut ends = [0, 0];
        for (end, e) in ends.iter_mut().zip([from, to]) {
            *end = match self.expr(e)? {
                Value::Const(Const::Number(n)) => consts::in_range(n, e.span, "the end of a range", 0..=32, self.sink)?,
                Value::Const(_) | Value::Node(_) => {
                    let d = Diagnostic::error(e.span, "the ends of a range must be constant", "");
                    return self.sink.fail(d.hint("shift by a word with `>>` and cut with `&`"));
                }
            };
        }
        let ([from_bit, to_bit], span) = (ends, from.span.to(to.span));
        if from_bit >= to_bit {
            let d = Diagnostic::error(span, format!("the range {from_bit}..{to_bit} has no bits"), "");
            return self.sink.fail(d.hint("`h[a..b]` is the word of bits a to b - 1"));
        }
        let word = word?;
        if let (Op::Window, Some(l)) = (self.state.decode.op(word), self.window)
            && to_bit > i128::from(l)
        {
            let d = Diagnostic::error(to.span, format!("the window has no bit {}", to_bit - 1), "");
            return self.sink.fail(d.hint(format!("it has bits 0 to {}", l - 1)));
        }
        self.bits(word, from_bit as u32, to_bit as u32).map(Value::Node)
    }

    /// Expands a function.
    fn expand(&mut self, f: &ast::Function, args: &[Expr], span: Span) -> Option<Value> {
        let values: Vec<_> = args.iter().map(|e| self.expr(e)).collect();
        if args.len() != f.params.len() {
            let params: Vec<&str> = f.params.iter().map(|p| p.name.as_str()).collect();
            let message = format!("`{}` takes {} arguments, not {}", f.name.name, params.len(), args.len());
            let d = Diagnostic::error(span, message, "");
            return self.sink.fail(d.hint(format!("its parameters are ({})", params.join(", "))));
        }
        self.state.expanded += 1;
        if self.state.calls.len() == MOST_CALLS_DEEP || self.state.expanded > MOST_CALLS {
            let d = Diagnostic::error(span, format!("`{}` calls too many functions", f.name.name), "");
            return self.sink.fail(d.hint("a function is expanded where it is called, and cannot call itself"));
        }
        let arguments = f.params.iter().zip(values);
        let arguments: Vec<Let> =
            arguments.map(|(name, value)| Let { name: name.clone(), value, used: true }).collect();
        let lets = std::mem::replace(&mut self.state.lets, arguments);
        let window = self.state.window_name.take();
        self.state.calls.push(span);
        let mut ok = self.state.lets.iter().all(|l| l.value.is_some());
        for (name, e) in &f.lets {
            if !ok {
                break;
            }
            let value = self.expr(e);
            if let Some(first) = self.state.lets.iter().find(|l| l.name.name == name.name) {
                let d = Diagnostic::error(name.span, format!("`{}` is defined twice", name.name), "again here");
                self.sink.push(d.label(first.name.span, "first here"));
                ok = false;
            }
            ok &= value.is_some();
            self.state.lets.push(Let { name: name.clone(), value, used: false });
        }
        let result = if ok { self.expr(&f.result) } else { None };
        for l in self.state.lets.iter().filter(|l| result.is_some() && !l.used) {
            let w = Diagnostic::warning(l.name.span, format!("`{}` is never used", l.name.name), "");
            self.sink.push(w.hint("take it out"));
        }
        self.state.calls.pop();
        self.state.lets = lets;
        self.state.window_name = window;
        result
    }

    /// The number of bits that are set in a word.
    fn count_bits(&mut self, mut x: Node) -> Option<Node> {
        // Sums of neighbouring bits, then of pairs, nibbles and bytes.
        for (by, mask) in [(1, 0x5555_5555), (2, 0x3333_3333), (4, 0x0f0f_0f0f)] {
            let (by, mask) = (self.constant(by)?, self.constant(mask)?);
            let high = self.node(Op::Binary(WordOp::Shr, x, by))?;
            let high = self.node(Op::Binary(WordOp::And, high, mask))?;
            let low = self.node(Op::Binary(WordOp::And, x, mask))?;
            x = self.node(Op::Binary(WordOp::Add, high, low))?;
        }
        self.node(Op::ByteSum(x))
    }

    fn index(&mut self, base: &Expr, index: &Expr) -> Option<Value> {
        if self.state.calls.is_empty()
            && let ExprKind::Name(name) = &base.kind
            && let Some(table) = self.tables.iter().position(|t| t.0.name == *name)
        {
            self.state.looked_up[table] = true;
            let node = self.word(index)?;
            let entries = self.tables[table].0.entries;
            let reach = self.width(node);
            if reach < 32 && 1u32.checked_shl(reach).is_some_and(|r| r < entries) {
                let d = Diagnostic::warning(
                    index.span,
                    format!("entries {}.. of the table `{name}` are never used", 1u32 << reach),
                    format!("this has {reach} bits"),
                );
                let bits = entries.trailing_zeros();
                self.sink.push(d.hint(format!("an index of {bits} bits reaches all {entries} entries")));
            }
            return self.push(Op::Lookup { table: table as u32, index: node });
        }
        let v = self.expr(base)?;
        let word = self.coerce(v, base.span, Type::Word);
        let i = match self.expr(index)? {
            Value::Const(Const::Number(n)) => consts::in_range(n, index.span, "the index of a bit", 0..=31, self.sink)?,
            Value::Const(_) | Value::Node(_) => {
                let d = Diagnostic::error(index.span, "the index of a bit must be constant", "");
                return self.sink.fail(d.hint("only a table takes a computed index"));
            }
        };
        let (word, i) = (word?, i as u32);
        if let (Op::Window, Some(l)) = (self.state.decode.op(word), self.window)
            && i >= l
        {
            let d = Diagnostic::error(index.span, format!("bit {i} of the window is always 0"), "");
            return self.sink.fail(d.hint(format!("the window has bits 0 to {}", l - 1)));
        }
        self.push(Op::Bit(word, i))
    }

    fn call(&mut self, f: &Ident, args: &[Expr], span: Span) -> Option<Value> {
        match f.name.as_str() {
            "byte" => {
                let [a, i] = args else { return self.arity(f, "a word and a byte's index", span) };
                let a = self.word(a);
                let i = match self.expr(i)? {
                    Value::Const(Const::Number(n)) => {
                        consts::in_range(n, i.span, "the index of a byte", 0..=3, self.sink)?
                    }
                    Value::Const(_) | Value::Node(_) => {
                        let d = Diagnostic::error(i.span, "the index of a byte must be constant", "");
                        return self.sink.fail(d.hint("byte 0 is the lowest"));
                    }
                };
                let a = a?;
                self.push(Op::Byte(a, i as u32))
            }
            "sum_bytes" => {
                let [a] = args else { return self.arity(f, "one word", span) };
                let a = self.word(a)?;
                self.push(Op::ByteSum(a))
            }
            "signs" => {
                self.count(args.len(), "`signs`", "bit", span);
                let bits: Vec<_> = args.iter().map(|e| self.node_of(e, Type::Bit)).collect();
                let bits = bits.into_iter().collect::<Option<_>>()?;
                self.right_count(args.len())?;
                self.push(Op::Signs(bits))
            }
            "parity" | "count" => {
                let [a] = args else { return self.arity(f, "one word", span) };
                let a = self.word(a)?;
                let n = self.count_bits(a)?;
                let n = if f.name == "parity" { self.bits(n, 0, 1)? } else { n };
                Some(Value::Node(n))
            }
            "negate" => {
                let [v, h] = args else { return self.arity(f, "a vector and a word", span) };
                let (v, h) = (self.vector_of(v), self.word(h));
                let (v, h) = (v?, h?);
                let mut bits = Vec::new();
                let mut words = Vec::new();
                for i in 0..self.vector? {
                    bits.push(self.node(Op::Bit(h, i))?);
                    words.push(self.bits(h, i, i + 1)?);
                }
                // The one's complement, and 1 more.
                let signs = self.node(Op::Signs(bits))?;
                let ones = self.node(Op::Pack(words))?;
                let complement = self.node(Op::Vector(VectorOp::Xor, v, signs))?;
                self.push(Op::Vector(VectorOp::Add, complement, ones))
            }
            name if self.functions.iter().any(|g| g.name.name == name) => {
                let function = self.functions.iter().find(|g| g.name.name == name)?;
                self.expand(function, args, span)
            }
            name if consts::FUNCTIONS.contains(&name) => {
                let mut values = Vec::new();
                for e in args {
                    match self.expr(e)? {
                        Value::Const(c) => values.push(c),
                        Value::Node(_) => {
                            let d = Diagnostic::error(
                                e.span,
                                format!("`{name}` is for constants"),
                                "this is computed from the window",
                            );
                            return self.sink.fail(d);
                        }
                    }
                }
                consts::call(name, f.span, &values, span, self.sink).map(Value::Const)
            }
            name if self.tables.iter().any(|t| t.0.name == name) => {
                let d = Diagnostic::error(span, format!("`{name}` is a table, not a function"), "");
                self.sink.fail(d.hint(format!("an entry is `{name}[index]`")))
            }
            _ if self.scope.lenient => None,
            name => {
                let own = self.functions.iter().map(|f| f.name.name.as_str());
                let known = FUNCTIONS.into_iter().chain(consts::FUNCTIONS).chain(own);
                let d = consts::unknown(name, f.span, "function", known);
                self.sink.fail(d)
            }
        }
    }

    fn arity<T>(&mut self, f: &Ident, takes: &str, span: Span) -> Option<T> {
        self.sink.fail(Diagnostic::error(span, format!("`{}` takes {takes}", f.name), ""))
    }

    /// Reports a number of components other than V.
    fn count(&mut self, found: usize, what: &str, part: &str, span: Span) {
        if let Some(v) = self.vector.filter(|v| *v as usize != found) {
            let d = Diagnostic::error(
                span,
                format!(
                    "{what} must have {v} {part}{}, one for each weight of a step, not {found}",
                    if v == 1 { "" } else { "s" }
                ),
                "",
            );
            self.sink.push(d.hint("their number is the code's `vector`"));
        }
    }

    fn right_count(&self, found: usize) -> Option<()> {
        self.vector.is_none_or(|v| v as usize == found).then_some(())
    }

    /// Upper bound on the bits of a word.
    fn width(&self, n: Node) -> u32 {
        let d = &self.state.decode;
        // Nodes refer to earlier ones: one pass.
        let mut widths: Vec<u32> = Vec::new();
        for op in &d.nodes[..=n.0 as usize] {
            let w = |n: &Node| widths[n.0 as usize];
            let shift = |n: &Node| match d.op(*n) {
                Op::Const(c) => Some((*c).min(32)),
                _ => None,
            };
            widths.push(match op {
                Op::Window => self.window.unwrap_or(32),
                Op::Const(c) => 32 - c.leading_zeros(),
                Op::Not(_) => 32,
                Op::Binary(op, a, b) => match op {
                    WordOp::Add => (w(a).max(w(b)) + 1).min(32),
                    WordOp::Sub => 32,
                    WordOp::Mul => (w(a) + w(b)).min(32),
                    WordOp::And => w(a).min(w(b)),
                    WordOp::Or | WordOp::Xor => w(a).max(w(b)),
                    WordOp::Shl => shift(b).map_or(32, |s| (w(a) + s).min(32)),
                    WordOp::Shr => shift(b).map_or(w(a), |s| w(a).saturating_sub(s)),
                },
                Op::Byte(a, i) => w(a).saturating_sub(8 * i).min(8),
                Op::ByteSum(_) => 10,
                Op::Bit(..) => 1,
                Op::Lookup { .. } | Op::Signs(_) | Op::Pack(_) | Op::Vector(..) => 0,
            });
        }
        widths[n.0 as usize]
    }
}

/// True if the value is a vector.
fn is_vector_node(d: &Decode, v: &Value) -> bool {
    matches!(v, Value::Node(n) if d.op(*n).ty() == Type::Vector)
}
