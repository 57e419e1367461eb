//! Jinja as Python has it: templates that were written for Jinja2 change lists, index by truth values and print None.
//! minijinja reads them; they are evaluated here, within bounds on work, nesting and output.

mod call;
mod evaluate;
mod filters;
mod json;
mod methods;
mod operate;
mod predicates;
mod sequences;
mod state;
mod syntax;
mod text;
mod value;

pub use methods::is_space;
pub use state::Draw;
pub use value::{Dict, Value};

use evaluate::Run;

/// What one rendering may use.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Expressions evaluated, and items made.
    pub fuel: u64,
    /// Macros and recursive loops within each other.
    pub depth: usize,
    /// Bytes printed.
    pub output: usize,
}

/// Why a template cannot be compiled or rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("it ran too long")]
    Fuel,
    #[error("it printed too much")]
    Output,
    #[error("macros or loops are nested too deeply")]
    Depth,
    /// What was looked for and is not there.
    #[error("{0} is undefined")]
    Undefined(String),
    #[error("{0}")]
    Other(String),
}

impl Fault {
    fn new(text: impl Into<String>) -> Self {
        Fault::Other(text.into())
    }

    fn undefined(what: &str) -> Self {
        Fault::Undefined(what.to_owned())
    }
}

/// Evaluated arguments of a call.
#[derive(Default)]
struct Arguments {
    given: Vec<Value>,
    named: Vec<(String, Value)>,
}

impl Arguments {
    /// The argument at `index`, or of this name.
    fn get(&self, index: usize, name: &str) -> Option<&Value> {
        self.given.get(index).or_else(|| self.named.iter().find(|(known, _)| known == name).map(|(_, value)| value))
    }

    fn named(&self, name: &str) -> Option<&Value> {
        self.named.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    fn at(&self, index: usize) -> Result<&Value, Fault> {
        self.given
            .get(index)
            .or_else(|| self.named.get(index).map(|(_, value)| value))
            .ok_or_else(|| Fault::new("an argument is missing"))
    }
}

/// A compiled template.
#[derive(Debug)]
pub struct Program(Vec<syntax::Stmt>);

impl Program {
    pub fn compile(source: &str) -> Result<Self, Fault> {
        syntax::compile(source).map(Program)
    }

    /// Renders with the variables that `look_up` knows.
    pub fn render(
        &self,
        look_up: &dyn Fn(&str) -> Option<Value>,
        draw: &mut Draw,
        limits: Limits,
    ) -> Result<String, Fault> {
        let mut run = Run::new(look_up, draw, limits);
        run.stmts(&self.0)?;
        Ok(run.finish())
    }
}
