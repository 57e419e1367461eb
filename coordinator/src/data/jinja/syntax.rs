//! A template as it is evaluated: minijinja's syntax tree, owned, with filters and tests looked up.

use super::filters::{self, Filter};
use super::operate::Operator;
use super::predicates::{self, Predicate};
use super::Fault;
use minijinja::machinery::ast;
use minijinja::syntax::SyntaxConfig;
use std::sync::Arc;

/// What a template can contain of itself.
#[derive(Debug, Clone)]
pub enum Constant {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
}

#[derive(Debug)]
pub enum Expr {
    Constant(Constant),
    Variable(Arc<str>),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, Arc<str>),
    Item(Box<Expr>, Box<Expr>),
    /// Start, stop and step; absent is None.
    Slice(Box<Expr>, Box<[Expr; 3]>),
    Call(Box<Expr>, Vec<Argument>),
    /// Without a subject: what a block gives to it.
    Filter(Option<Box<Expr>>, FilterName, Vec<Argument>),
    Test(Box<Expr>, TestName, Vec<Argument>),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Arithmetic(Operator, Box<Expr>, Box<Expr>),
    Concat(Box<Expr>, Box<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    If(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
}

pub struct FilterName(pub(super) Filter);
pub struct TestName(pub(super) Predicate);

impl std::fmt::Debug for FilterName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("filter")
    }
}

impl std::fmt::Debug for TestName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("test")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Debug)]
pub enum Argument {
    Given(Expr),
    Named(Arc<str>, Expr),
    All(Expr),
    AllNamed(Expr),
}

/// What is assigned to.
#[derive(Debug)]
pub enum Target {
    Name(Arc<str>),
    Attribute(Arc<str>, Arc<str>),
    Several(Vec<Target>),
}

#[derive(Debug)]
pub enum Stmt {
    Text(Box<str>),
    Print(Expr),
    For(Arc<ForLoop>),
    If(Expr, Vec<Stmt>, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    Set(Target, Expr),
    SetBlock(Target, Option<Expr>, Vec<Stmt>),
    FilterBlock(Expr, Vec<Stmt>),
    Macro(Arc<Macro>),
    CallBlock(Expr, Arc<Macro>),
    Scope(Vec<Stmt>),
    Evaluate(Expr),
}

#[derive(Debug)]
pub struct ForLoop {
    pub target: Target,
    pub iter: Expr,
    pub filter: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Stmt>,
    pub otherwise: Vec<Stmt>,
}

#[derive(Debug)]
pub struct Macro {
    pub name: Arc<str>,
    pub parameters: Vec<Arc<str>>,
    /// Of the last parameters.
    pub defaults: Vec<Expr>,
    pub body: Vec<Stmt>,
}

/// Compiles a template. Like Python's, it ends its lines with \n whatever its file has.
pub fn compile(source: &str) -> Result<Vec<Stmt>, Fault> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let tree = minijinja::machinery::parse(&source, "template", SyntaxConfig::default()).map_err(|error| {
        let line = error.line().map(|line| format!(" (template line {line})")).unwrap_or_default();
        let detail = error.detail().map(str::to_owned).unwrap_or_else(|| error.kind().to_string());
        Fault::new(format!("{}{line}", detail.replace('\n', " ")))
    })?;
    match tree {
        ast::Stmt::Template(template) => stmts(&template.children),
        _ => Err(Fault::new("no template")),
    }
}

fn stmts(all: &[ast::Stmt<'_>]) -> Result<Vec<Stmt>, Fault> {
    all.iter().map(stmt).collect()
}

fn stmt(one: &ast::Stmt<'_>) -> Result<Stmt, Fault> {
    let loader = |what: &str| Fault::new(format!("{{% {what} %}} needs other templates, which there are none of"));
    Ok(match one {
        ast::Stmt::Template(t) => Stmt::Scope(stmts(&t.children)?),
        ast::Stmt::EmitExpr(e) => Stmt::Print(expr(&e.expr)?),
        ast::Stmt::EmitRaw(raw) => Stmt::Text(raw.raw.into()),
        ast::Stmt::ForLoop(f) => Stmt::For(Arc::new(ForLoop {
            target: target(&f.target)?,
            iter: expr(&f.iter)?,
            filter: f.filter_expr.as_ref().map(expr).transpose()?,
            recursive: f.recursive,
            body: stmts(&f.body)?,
            otherwise: stmts(&f.else_body)?,
        })),
        ast::Stmt::IfCond(c) => Stmt::If(expr(&c.expr)?, stmts(&c.true_body)?, stmts(&c.false_body)?),
        ast::Stmt::WithBlock(w) => {
            let all = w.assignments.iter().map(|(name, value)| Ok((target(name)?, expr(value)?)));
            Stmt::With(all.collect::<Result<_, Fault>>()?, stmts(&w.body)?)
        }
        ast::Stmt::Set(s) => Stmt::Set(target(&s.target)?, expr(&s.expr)?),
        ast::Stmt::SetBlock(s) => {
            Stmt::SetBlock(target(&s.target)?, s.filter.as_ref().map(expr).transpose()?, stmts(&s.body)?)
        }
        ast::Stmt::AutoEscape(_) => return Err(Fault::new("{% autoescape %} is not supported; remove it")),
        ast::Stmt::FilterBlock(f) => Stmt::FilterBlock(expr(&f.filter)?, stmts(&f.body)?),
        ast::Stmt::Block(b) => Stmt::Scope(stmts(&b.body)?),
        ast::Stmt::Import(_) | ast::Stmt::FromImport(_) => return Err(loader("import")),
        ast::Stmt::Extends(_) => return Err(loader("extends")),
        ast::Stmt::Include(_) => return Err(loader("include")),
        ast::Stmt::Macro(m) => Stmt::Macro(Arc::new(macro_of(m)?)),
        ast::Stmt::CallBlock(c) => {
            let call = Expr::Call(Box::new(expr(&c.call.expr)?), arguments(&c.call.args)?);
            Stmt::CallBlock(call, Arc::new(macro_of(&c.macro_decl)?))
        }
        ast::Stmt::Do(d) => Stmt::Evaluate(Expr::Call(Box::new(expr(&d.call.expr)?), arguments(&d.call.args)?)),
        #[allow(unreachable_patterns)]
        _ => return Err(Fault::new("a statement is not supported")),
    })
}

fn macro_of(m: &ast::Macro<'_>) -> Result<Macro, Fault> {
    let name = |e: &ast::Expr<'_>| match e {
        ast::Expr::Var(v) => Ok(Arc::from(v.id)),
        _ => Err(Fault::new("a macro's parameters must be names")),
    };
    Ok(Macro {
        name: m.name.into(),
        parameters: m.args.iter().map(name).collect::<Result<_, _>>()?,
        defaults: exprs(&m.defaults)?,
        body: stmts(&m.body)?,
    })
}

fn target(e: &ast::Expr<'_>) -> Result<Target, Fault> {
    Ok(match e {
        ast::Expr::Var(v) => Target::Name(v.id.into()),
        ast::Expr::List(l) => Target::Several(l.items.iter().map(target).collect::<Result<_, _>>()?),
        ast::Expr::Tuple(t) => Target::Several(t.items.iter().map(target).collect::<Result<_, _>>()?),
        ast::Expr::GetAttr(g) => match &g.expr {
            ast::Expr::Var(v) => Target::Attribute(v.id.into(), g.name.into()),
            _ => return Err(Fault::new("only a namespace's attributes can be set")),
        },
        other => return Err(Fault::new(format!("a {} cannot be assigned to", other.description()))),
    })
}

fn exprs(all: &[ast::Expr<'_>]) -> Result<Vec<Expr>, Fault> {
    all.iter().map(expr).collect()
}

fn boxed(e: &ast::Expr<'_>) -> Result<Box<Expr>, Fault> {
    Ok(Box::new(expr(e)?))
}

fn expr(e: &ast::Expr<'_>) -> Result<Expr, Fault> {
    use ast::BinOpKind as Op;
    Ok(match e {
        ast::Expr::Var(v) => Expr::Variable(v.id.into()),
        ast::Expr::Const(c) => Expr::Constant(constant(&c.value)?),
        ast::Expr::Slice(s) => {
            let bound = |e: &Option<ast::Expr<'_>>| e.as_ref().map_or(Ok(Expr::Constant(Constant::None)), expr);
            Expr::Slice(boxed(&s.expr)?, Box::new([bound(&s.start)?, bound(&s.stop)?, bound(&s.step)?]))
        }
        ast::Expr::UnaryOp(u) => match u.op {
            ast::UnaryOpKind::Not => Expr::Not(boxed(&u.expr)?),
            ast::UnaryOpKind::Neg => Expr::Negative(boxed(&u.expr)?),
        },
        ast::Expr::BinOp(b) => {
            let (left, right) = (boxed(&b.left)?, boxed(&b.right)?);
            let compare = |left, how, right: Box<Expr>| Expr::Compare(left, vec![(how, *right)]);
            match b.op {
                Op::ScAnd => Expr::And(left, right),
                Op::ScOr => Expr::Or(left, right),
                Op::Concat => Expr::Concat(left, right),
                Op::Add => Expr::Arithmetic(Operator::Add, left, right),
                Op::Sub => Expr::Arithmetic(Operator::Sub, left, right),
                Op::Mul => Expr::Arithmetic(Operator::Mul, left, right),
                Op::Div => Expr::Arithmetic(Operator::Div, left, right),
                Op::FloorDiv => Expr::Arithmetic(Operator::FloorDiv, left, right),
                Op::Rem => Expr::Arithmetic(Operator::Rem, left, right),
                Op::Pow => Expr::Arithmetic(Operator::Pow, left, right),
                Op::Eq => compare(left, Comparison::Eq, right),
                Op::Ne => compare(left, Comparison::Ne, right),
                Op::Lt => compare(left, Comparison::Lt, right),
                Op::Lte => compare(left, Comparison::Le, right),
                Op::Gt => compare(left, Comparison::Gt, right),
                Op::Gte => compare(left, Comparison::Ge, right),
                Op::In => compare(left, Comparison::In, right),
            }
        }
        ast::Expr::Compare(c) => {
            let how = |op: ast::CompareOpKind| match op {
                ast::CompareOpKind::Eq => Comparison::Eq,
                ast::CompareOpKind::Ne => Comparison::Ne,
                ast::CompareOpKind::Lt => Comparison::Lt,
                ast::CompareOpKind::Lte => Comparison::Le,
                ast::CompareOpKind::Gt => Comparison::Gt,
                ast::CompareOpKind::Gte => Comparison::Ge,
                ast::CompareOpKind::In => Comparison::In,
                ast::CompareOpKind::NotIn => Comparison::NotIn,
            };
            let all = c.ops.iter().map(|op| Ok((how(op.op), expr(&op.expr)?)));
            Expr::Compare(boxed(&c.expr)?, all.collect::<Result<_, Fault>>()?)
        }
        ast::Expr::IfExpr(i) => {
            let otherwise = i.false_expr.as_ref().map(boxed).transpose()?;
            Expr::If(boxed(&i.test_expr)?, boxed(&i.true_expr)?, otherwise)
        }
        ast::Expr::Filter(f) => {
            let filter = filters::find(f.name)
                .ok_or_else(|| Fault::new(format!("the filter \"{}\" does not exist here", f.name)))?;
            Expr::Filter(f.expr.as_ref().map(boxed).transpose()?, FilterName(filter), arguments(&f.args)?)
        }
        ast::Expr::Test(t) => {
            let test = predicates::find(t.name)
                .ok_or_else(|| Fault::new(format!("the test \"{}\" does not exist here", t.name)))?;
            Expr::Test(boxed(&t.expr)?, TestName(test), arguments(&t.args)?)
        }
        ast::Expr::GetAttr(g) => Expr::Attribute(boxed(&g.expr)?, g.name.into()),
        ast::Expr::GetItem(g) => Expr::Item(boxed(&g.expr)?, boxed(&g.subscript_expr)?),
        ast::Expr::Call(c) => Expr::Call(boxed(&c.expr)?, arguments(&c.args)?),
        ast::Expr::List(l) => Expr::List(exprs(&l.items)?),
        ast::Expr::Tuple(t) => Expr::Tuple(exprs(&t.items)?),
        ast::Expr::Map(m) => {
            let pairs = m.keys.iter().zip(&m.values).map(|(key, value)| Ok((expr(key)?, expr(value)?)));
            Expr::Dict(pairs.collect::<Result<_, Fault>>()?)
        }
    })
}

fn arguments(all: &[ast::CallArg<'_>]) -> Result<Vec<Argument>, Fault> {
    let one = |argument: &ast::CallArg<'_>| {
        Ok(match argument {
            ast::CallArg::Pos(e) => Argument::Given(expr(e)?),
            ast::CallArg::Kwarg(name, e) => Argument::Named((*name).into(), expr(e)?),
            ast::CallArg::PosSplat(e) => Argument::All(expr(e)?),
            ast::CallArg::KwargSplat(e) => Argument::AllNamed(expr(e)?),
        })
    };
    all.iter().map(one).collect()
}

fn constant(value: &minijinja::Value) -> Result<Constant, Fault> {
    use minijinja::value::ValueKind;
    let refuse = || Fault::new(format!("the constant {value} is not supported"));
    Ok(match value.kind() {
        ValueKind::None | ValueKind::Undefined => Constant::None,
        ValueKind::Bool => Constant::Bool(value.is_true()),
        ValueKind::String => Constant::Str(value.as_str().unwrap_or_default().into()),
        ValueKind::Number if value.is_integer() => Constant::Int(i128::try_from(value.clone()).map_err(|_| refuse())?),
        ValueKind::Number => Constant::Float(f64::try_from(value.clone()).map_err(|_| refuse())?),
        _ => return Err(refuse()),
    })
}
