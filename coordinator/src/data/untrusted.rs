//! Rows and templates that others wrote, as bytes: the doors at which fuzzing knocks. Whatever comes, there is a value or a
//! sentence, in bounded time and memory.

use super::conversation::{Conversation, Names};
use super::detect::Kind;
use super::render::{Rendered, Renderer};
use super::row::Row;
use std::path::Path;
use unisono_configs::run::RunConfig;

/// One line of a JSONL file: its hash, and how often it can be read as a row of some kind.
pub fn row(line: &[u8]) -> Result<(u128, usize), String> {
    let row: Row<'_> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let renderers = [Renderer::Columns, Renderer::Text, Renderer::Alpaca];
    let pairs = renderers.iter().filter(|renderer| renderer.render(&row).is_ok()).count();
    let names = Names::default();
    let talks = [
        Conversation::of_messages(&row, &names),
        Conversation::of_columns(&row, &names),
        Conversation::of_sharegpt(&row, &names),
    ];
    Ok((row.hash(), pairs + talks.iter().filter(|talk| talk.is_ok()).count()))
}

/// A template and, after the first line that is only `---`, a row: the bytes that come out.
pub fn template(bytes: &[u8]) -> Result<usize, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let (source, line) = text.split_once("\n---\n").unwrap_or((text, "{}"));
    let data = "[model]\npath = \"m\"\n[[data]]\npath = \"d.jsonl\"\n";
    let mut config = RunConfig::parse("config.toml", data, Path::new("")).map_err(|error| error.to_string())?;
    let mut table = config.data.remove(0);
    table.template = Some(source.to_owned());
    let renderer = Renderer::new(&table, "data", Kind::Template, Path::new("m")).map_err(|error| error.to_string())?;
    let row: Row<'_> = serde_json::from_str(line).map_err(|error| error.to_string())?;
    Ok(match renderer.render(&row)? {
        Rendered::Pair { prompt, completion } => prompt.len() + completion.len(),
        Rendered::Chat { text, .. } => text.len(),
    })
}
