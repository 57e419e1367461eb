//! A progress bar with loss, tokens per second and time left, for a terminal.

use super::plain::{clock, grouped, line};
use super::state::RunState;
use super::View;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io;
use std::time::Duration;
use unisono_proto::v1::{event::Body, Event};

/// Steps move the bar; every other event is a line above it.
pub struct Bar {
    bar: ProgressBar,
    /// Memory is reported with every step, or nearly; the summary shows it.
    seen_memory: std::collections::BTreeSet<u32>,
}

impl Default for Bar {
    fn default() -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(8));
        let style = ProgressStyle::with_template("{spinner} {wide_bar} {pos}/{len} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        // Loading and evaluating take a while without an event: the spinner shows that something lives.
        bar.enable_steady_tick(Duration::from_millis(250));
        bar.set_message("waiting for workers");
        Bar { bar, seen_memory: Default::default() }
    }
}

impl View for Bar {
    fn show(&mut self, event: &Event, state: &RunState) -> io::Result<()> {
        match &event.body {
            Some(Body::Step(step)) => {
                self.bar.set_length(state.steps());
                let rate = state.recent_tokens_per_second().unwrap_or(0.0);
                let eta = state.eta_seconds().unwrap_or(0.0);
                self.bar.set_message(format!(
                    "loss {:.4} {} tok/s ETA {}",
                    step.loss,
                    grouped(rate.round() as u64),
                    clock(eta)
                ));
                self.bar.set_position(step.step);
            }
            Some(Body::Memory(memory)) if !self.seen_memory.insert(memory.rank) => {}
            // The command prints the failure's sentence itself.
            Some(Body::Failed(_) | Body::Stopped(_)) => self.bar.finish_and_clear(),
            Some(Body::Done(_)) => self.bar.finish_and_clear(),
            Some(body) => {
                match body {
                    Body::Started(started) => self.bar.set_length(started.steps),
                    Body::Membership(_) => self.bar.set_message("loading"),
                    _ => {}
                }
                if let Some(line) = line(event, state) {
                    self.bar.println(line);
                }
            }
            None => {}
        }
        Ok(())
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if !self.bar.is_finished() {
            self.bar.abandon();
        }
    }
}
