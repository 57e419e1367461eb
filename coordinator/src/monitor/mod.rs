//! Viewers of a run: they see only the events of `unisono_proto::v1::monitor` and never the machine.
//!
//! `state` folds events; each view (`plain`, `bar`, `json`, `summary`) reads the state and the event at hand. The
//! coordinator's own display and `unisono monitor` are the same code at the two ends of the `Watch` stream.

pub mod bar;
pub mod conn;
pub mod json;
pub mod plain;
pub mod state;
pub mod summary;

use state::RunState;
use std::io;
use unisono_proto::v1::Event;

/// What a person or a script sees of a run.
pub trait View: Send {
    /// Shows `event`, which `state` already contains.
    fn show(&mut self, event: &Event, state: &RunState) -> io::Result<()>;

    /// Writes what could not be written before.
    fn catch_up(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A run's state and the views of it.
#[derive(Default)]
pub struct Display {
    pub state: RunState,
    views: Vec<Box<dyn View>>,
}

impl Display {
    pub fn new(views: Vec<Box<dyn View>>) -> Self {
        Display { state: RunState::default(), views }
    }

    /// Folds `event` in and shows it. An event that was already seen shows nothing. A view whose output is gone (a
    /// closed pipe) is dropped: a run does not end because nobody looks.
    pub fn observe(&mut self, event: &Event) {
        if !self.state.apply(event) {
            return;
        }
        let state = &self.state;
        self.views.retain_mut(|view| is_there(&view.show(event, state)));
    }

    /// Whether all is shown, what could not be written before included.
    pub fn catch_up(&mut self) -> bool {
        let mut caught_up = true;
        self.views.retain_mut(|view| {
            let outcome = view.catch_up();
            caught_up &= outcome.is_ok() || !is_there(&outcome);
            is_there(&outcome)
        });
        caught_up
    }
}

/// Whether somebody may still read: on a full disk there may be room again, in a pipe that was closed nobody looks.
fn is_there(outcome: &io::Result<()>) -> bool {
    !matches!(outcome, Err(error) if error.kind() == io::ErrorKind::BrokenPipe)
}
