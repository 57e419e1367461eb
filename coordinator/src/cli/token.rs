//! `token`: for whoever is to take part in a run, or to look on, from another machine.

use super::{print, Error, Result};
use crate::serve::identity::{Identity, Terms};
use std::path::PathBuf;
use unisono_proto::dial::Role;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono token runs/tiny-001 --uses 4 > worker.token      # for four more workers
  unisono token runs/tiny-001 --role monitor > monitor.token
  UNISONO_TOKEN_FILE=monitor.token unisono monitor node1:7070

A worker that was let in is given a pass, and keeps it beside UNISONO_TOKEN_FILE: started again it needs no token.

Exit codes: 0 done, 2 no coordinator runs there.")]
pub struct Args {
    /// A run's directory, on the coordinator's machine
    run: PathBuf,
    /// What it is for: worker takes part, monitor looks on, operator looks on too: there are no commands yet
    #[arg(long, default_value = "worker", value_parser = role)]
    role: Role,
    /// Hours after which it lets nobody in any more
    #[arg(long, default_value_t = 24.0, value_parser = hours)]
    hours: f64,
    /// Workers that it lets in, each process once; others may come as often as they like until it ends
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
}

fn role(text: &str) -> std::result::Result<Role, String> {
    Role::parse(text).ok_or_else(|| "it must be worker, monitor or operator".into())
}

fn hours(text: &str) -> std::result::Result<f64, String> {
    let hours = text.parse().ok().filter(|&hours| hours > 0.0 && hours <= 87_600.0);
    hours.ok_or_else(|| "it must be a number above 0, and at most 87600".into())
}

pub fn run(args: Args) -> Result<()> {
    let seal = Identity::seal_of(&args.run).map_err(Error::bad_input)?;
    let terms = Terms { hours: args.hours, uses: Some(args.uses).filter(|_| args.role == Role::Worker) };
    print(&format!("{}\n", seal.invite(args.role, terms).reveal()));
    eprintln!("{}", self::terms(args.role, terms));
    Ok(())
}

/// What somebody should know of a token made now.
pub fn terms(role: Role, terms: Terms) -> String {
    let until = utc(crate::serve::identity::now() + (terms.hours * 3600.0) as u64);
    match terms.uses {
        Some(1) => format!("lets one {} in, until {until}", role.name()),
        Some(uses) => format!("lets {uses} {}s in, until {until}", role.name()),
        None => format!("for a {}, until {until}", role.name()),
    }
}

/// Seconds since the Unix epoch as people write them.
fn utc(seconds: u64) -> String {
    let (mut days, minutes) = (seconds / 86_400, seconds % 86_400 / 60);
    let leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02} {:02}:{:02} UTC", days + 1, minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let dates = [
            (0, "1970-01-01 00:00 UTC"),
            (951_825_599, "2000-02-29 11:59 UTC"),
            (1_735_689_599, "2024-12-31 23:59 UTC"),
        ];
        dates.into_iter().for_each(|(seconds, date)| assert_eq!(utc(seconds), date));
    }
}
