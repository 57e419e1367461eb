//! Findings for people: those of one kind together, what is wrong and what to do said once.

use super::finding::{Finding, Severity, SHOWN};
use super::kind::Kind;
use crate::data::view::printable;

/// Tasks listed below a kind.
const LISTED: usize = 20;

/// One paragraph for each kind and severity, the gravest first.
pub fn show(findings: &[Finding]) -> String {
    let mut heads: Vec<(Severity, Kind)> = findings.iter().map(|f| (f.severity, f.kind)).collect();
    heads.sort_unstable();
    heads.dedup();
    let mut out = String::new();
    for (severity, kind) in heads {
        let own: Vec<&Finding> = findings.iter().filter(|f| (f.severity, f.kind) == (severity, kind)).collect();
        let word = match severity {
            Severity::Error => "refused",
            Severity::Warning => "warning",
            Severity::Note => "note",
        };
        out += &format!("{word} {}: {}; {}\n", kind.id(), kind.title(), kind.remedy());
        for finding in own.iter().take(LISTED) {
            out += &format!("  {}\n", printable(&line(finding)).replace('\n', "⏎"));
        }
        if own.len() > LISTED {
            out += &format!("  and {} more\n", own.len() - LISTED);
        }
    }
    out
}

/// Task, what was found, and where.
fn line(finding: &Finding) -> String {
    let more = if finding.count > SHOWN as u64 { ", ..." } else { "" };
    match places(&finding.places) {
        places if places.is_empty() => format!("{}: {}", finding.task, finding.text),
        places => format!("{}: {} ({places}{more})", finding.task, finding.text),
    }
}

/// The places without their directories, which the task's table names; a file named once for several lines.
fn places(places: &[String]) -> String {
    let mut out = String::new();
    // Of the place before: its files, and the file named last.
    let (mut before, mut last) = (Vec::new(), "");
    for place in places {
        let parts = place.split(' ').map(|part| {
            let name = part.rsplit('/').next().unwrap_or(part);
            name.rsplit_once(':').unwrap_or(("", name))
        });
        let parts: Vec<(&str, &str)> = parts.collect();
        let files: Vec<&str> = parts.iter().map(|(file, _)| *file).collect();
        let same = files == before;
        let mut words: Vec<String> = Vec::new();
        for (file, line) in parts {
            let bare = file.is_empty() || same || file == last;
            words.push(if bare { line.to_owned() } else { format!("{file}:{line}") });
            last = if file.is_empty() { last } else { file };
        }
        before = files;
        out += &format!("{}{}", if out.is_empty() { "" } else { ", " }, words.join(" "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_configs::run::Gate;

    #[test]
    fn kinds_stand_together_and_files_are_named_once() {
        let found = |kind, task: &str, places: &[&str]| {
            let places = places.iter().map(|p| (*p).to_owned()).collect();
            Finding::new(&Gate::default(), kind, task, 4, 8, "4 of 8 rows".into()).unwrap().at(places)
        };
        let all = [
            found(
                Kind::Duplicates,
                "a",
                &["/d/a.jsonl:3 = /d/a.jsonl:1", "/d/a.jsonl:9 = /d/b.jsonl:2", "/d/a.jsonl:7 = /d/b.jsonl:4"],
            ),
            found(Kind::EndOfText, "b", &["/d/b.jsonl:1", "/d/b.jsonl:2"]),
            found(Kind::Duplicates, "c\u{1b}[31m", &[]),
        ];
        let text = show(&all);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("warning end-of-text: ") && lines[2].starts_with("warning duplicates: "),
            "{text}"
        );
        assert_eq!(lines[1], "  b: 4 of 8 rows (b.jsonl:1, 2, ...)");
        assert_eq!(lines[3], "  a: 4 of 8 rows (a.jsonl:3 = 1, 9 = b.jsonl:2, 7 = 4, ...)");
        assert_eq!(lines[4], "  c\u{FFFD}[31m: 4 of 8 rows");
    }
}
