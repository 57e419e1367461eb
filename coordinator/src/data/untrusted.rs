//! Rows and templates that others wrote, as bytes: the doors at which fuzzing knocks. Whatever comes, there is a value or a
//! sentence, in bounded time and memory.

use super::conversation::{Conversation, Names};
use super::detect::Kind;
use super::render::{Rendered, Renderer};
use super::row::Row;
use super::shots::Draws;
use std::path::Path;
use unisono_configs::run::RunConfig;

/// What reads rows of `kind`, with `template` where that is one.
fn renderer(kind: Kind, template: Option<&str>) -> Result<Renderer, String> {
    let text = "[model]\npath = \"m\"\n[[data]]\npath = \"d.jsonl\"\n";
    let mut config = RunConfig::parse("config.toml", text, Path::new("")).map_err(|error| error.to_string())?;
    config.data[0].template = template.map(str::to_owned);
    let data = &config.data[0];
    let draws = Draws::of(&config, data).map_err(|error| error.to_string())?;
    Renderer::new(data, "data", kind, Path::new("m"), &draws).map_err(|error| error.to_string())
}

/// One line of a JSONL file: its hash, and how often it can be read as a row of some kind.
pub fn row(line: &[u8]) -> Result<(u128, usize), String> {
    let row: Row<'_> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let mut kinds = 0;
    for kind in [Kind::Columns, Kind::Text, Kind::Alpaca] {
        kinds += usize::from(renderer(kind, None)?.render(&row).is_ok());
    }
    let names = Names::default();
    let talks = [
        Conversation::of_messages(&row, &names),
        Conversation::of_columns(&row, &names),
        Conversation::of_sharegpt(&row, &names),
    ];
    Ok((row.hash(), kinds + talks.iter().filter(|talk| talk.is_ok()).count()))
}

/// A template and, after the first line that is only `---`, a row: the bytes that come out.
pub fn template(bytes: &[u8]) -> Result<usize, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let (source, line) = text.split_once("\n---\n").unwrap_or((text, "{}"));
    let renderer = renderer(Kind::Template, Some(source))?;
    let row: Row<'_> = serde_json::from_str(line).map_err(|error| error.to_string())?;
    Ok(match renderer.render(&row).map_err(|problem| problem.words)? {
        Rendered::Pair { prompt, completion } => prompt.len() + completion.len(),
        Rendered::Chat { text, .. } => text.len(),
    })
}
