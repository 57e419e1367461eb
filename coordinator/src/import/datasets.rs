//! The data tables: paths, formats, what is trained on, what is held out.

use super::source::{show, Given};
use super::{Draft, Error, Origin};
use crate::yaml::Node;
use toml::{Table, Value};

pub fn translate(given: &Given, draft: &mut Draft) -> Result<(), Error> {
    match draft.origin {
        Origin::Axolotl => axolotl(given, draft)?,
        Origin::Trl => trl(given, draft)?,
    }
    if draft.data.is_empty() {
        draft.data.push(Table::from_iter([("path".to_owned(), Value::from("rows.jsonl"))]));
        draft.note("the file names no data; set data.path");
    }
    Ok(())
}

fn axolotl(given: &Given, draft: &mut Draft) -> Result<(), Error> {
    for (index, node) in given.node("datasets").map(Node::list).unwrap_or_default().iter().enumerate() {
        let place = |key: &str| format!("datasets.{index}.{key}");
        let text = |key: &str| node.get(key).and_then(Node::text);
        let mut table = Table::new();
        let path = text("path").unwrap_or("rows.jsonl");
        // `path: json` with data_files is how Hugging Face's loaders name a local file.
        let files = text("data_files").or_else(|| match node.get("data_files").map(Node::list) {
            Some([one]) => one.text(),
            _ => None,
        });
        let path = if matches!(path, "json" | "parquet" | "csv") { files.unwrap_or(path) } else { path };
        named(draft, &mut table, path);
        let kind = node.get("type");
        let name = kind.and_then(Node::text).unwrap_or_default();
        match (name, kind) {
            ("", Some(custom)) if !custom.entries().is_empty() => custom_type(draft, &mut table, custom, &place("type")),
            ("", _) => (),
            ("alpaca", _) => format(&mut table, "alpaca"),
            ("completion", _) => match text("field") {
                None | Some("text") => format(&mut table, "text"),
                Some(field) => drop(table.insert("template".into(), format!("|||{{{{ {field} }}}}").into())),
            },
            ("chat_template" | "chat_template.default", _) => chat(draft, &mut table, node, index),
            ("sharegpt", _) => format(&mut table, "sharegpt"),
            (other, _) => draft.leave(
                &place("type"),
                other,
                "data.format is alpaca, messages, sharegpt, prompt-completion or text; set data.template for its wording",
            ),
        }
        if let Some(roles) = node.get("roles_to_train").map(Node::list).filter(|roles| !roles.is_empty()) {
            let names: Vec<Value> = roles.iter().filter_map(Node::text).map(Value::from).collect();
            table.insert("roles_to_train".into(), Value::Array(names));
        }
        let known = [
            "path",
            "type",
            "data_files",
            "ds_type",
            "field",
            "field_messages",
            "message_property_mappings",
            "roles_to_train",
        ];
        for (key, value) in
            node.entries().iter().filter(|(key, value)| !known.contains(&key.as_str()) && !value.is_null())
        {
            let reason = match (key.as_str(), value.text()) {
                ("split", Some("train")) => continue,
                ("split" | "name", _) => "all rows of the path are read; export the part that is meant as a file",
                ("message_field_role" | "message_field_content", _) => "turns are role and content, or from and value",
                ("train_on_eos", _) => "a completion's end of text is always trained on",
                ("shards", _) => "all rows of the path are read",
                ("chat_template", _) => "conversations are rendered by the model's own chat template",
                _ => "there is nothing like it here",
            };
            draft.leave(&place(key), &show(value), reason);
        }
        draft.data.push(table);
    }
    match given.number("val_set_size")? {
        Some(share) if (0.0..1.0).contains(&share) => draft.set("split", "validation", share),
        Some(rows) => {
            draft.leave(
                "val_set_size",
                &rows.to_string(),
                "split.validation is a share of the rows; 0.05 stands for it",
            );
            draft.set("split", "validation", 0.05);
        }
        None => draft.set("split", "validation", 0.0),
    }
    draft.set("split", "test", 0.0);
    match (given.node("test_datasets").map(Node::list), draft.data.as_mut_slice()) {
        (Some([one]), [table]) if one.get("path").and_then(Node::text).is_some() => {
            let path = one.get("path").and_then(Node::text).unwrap_or_default();
            table.insert("validation".into(), path.into());
        }
        (Some(several), _) if !several.is_empty() => {
            let value = several.iter().map(show).collect::<Vec<_>>().join(", ");
            draft.leave("test_datasets", &value, "set data.validation of each table to its file");
        }
        _ => (),
    }
    if given.flag("train_on_inputs") == Some(true) {
        draft.leave("train_on_inputs", "true", "the loss is on completion tokens only");
    }
    Ok(())
}

fn format(table: &mut Table, name: &str) {
    table.insert("format".into(), name.into());
}

/// A table of `path`, under a name that no other has.
fn named(draft: &mut Draft, table: &mut Table, path: &str) {
    let stem = path.rsplit('/').next().unwrap_or(path);
    let stem = stem.rsplit_once('.').map_or(stem, |(stem, _)| stem);
    let taken = |name: &str| draft.data.iter().any(|t| t.get("name").and_then(Value::as_str) == Some(name));
    let mut name = stem.to_owned();
    for number in 2.. {
        if !taken(&name) {
            break;
        }
        name = format!("{stem}-{number}");
    }
    table.insert("name".into(), name.into());
    table.insert("path".into(), path.into());
    let is_file = [".jsonl", ".json", ".parquet"].iter().any(|ending| path.ends_with(ending));
    if !is_file {
        draft.note(format!(
            "\"{path}\" is a name on the Hugging Face Hub, or a directory; see data.path in the reference"
        ));
    }
}

/// `type: chat_template`: messages, or turns of from and value.
fn chat(draft: &mut Draft, table: &mut Table, node: &Node, index: usize) {
    let mapped = |key: &str| node.get("message_property_mappings").and_then(|m| m.get(key)).and_then(Node::text);
    let turns = (mapped("role").unwrap_or("role"), mapped("content").unwrap_or("content"));
    let field = node.get("field_messages").and_then(Node::text).unwrap_or("messages");
    match (field, turns) {
        ("messages" | "conversations", ("role", "content")) => format(table, "messages"),
        ("conversations", ("from", "value")) => format(table, "sharegpt"),
        (field, (role, content)) => {
            format(table, "messages");
            draft.leave(
                &format!("datasets.{index}.field_messages"),
                &format!("{field}, turns of {role} and {content}"),
                "rename the columns to messages, role and content",
            );
        }
    }
}

/// Axolotl's own wording: format with {instruction} and {input}, no_input_format where there is no input.
fn custom_type(draft: &mut Draft, table: &mut Table, custom: &Node, place: &str) {
    let field = |key: &str, default: &str| custom.get(key).and_then(Node::text).unwrap_or(default).to_owned();
    let (instruction, input) = (field("field_instruction", "instruction"), field("field_input", "input"));
    let output = field("field_output", "output");
    let Some(wording) = custom.get("format").and_then(Node::text) else {
        draft.leave(place, &show(custom), "set data.template, for example \"{{ instruction }}\\n|||{{ output }}\"");
        return;
    };
    let jinja = |text: &str| {
        text.replace("{instruction}", &format!("{{{{ {instruction} }}}}"))
            .replace("{input}", &format!("{{{{ {input} }}}}"))
    };
    let prompt = match custom.get("no_input_format").and_then(Node::text) {
        Some(without) => format!("{{% if {input} %}}{}{{% else %}}{}{{% endif %}}", jinja(wording), jinja(without)),
        None => jinja(wording),
    };
    table.insert("template".into(), format!("{prompt}|||{{{{ {output} }}}}").into());
    if let Some(system) = custom.get("system_prompt").filter(|node| node.text().is_some_and(|text| !text.is_empty())) {
        draft.leave(&format!("{place}.system_prompt"), &show(system), "write it at the beginning of data.template");
    }
}

fn trl(given: &Given, draft: &mut Draft) -> Result<(), Error> {
    let mut paths: Vec<String> = given.text("dataset_name").map(str::to_owned).into_iter().collect();
    for node in given.node("datasets").map(Node::list).unwrap_or_default() {
        paths.extend(node.get("path").and_then(Node::text).map(str::to_owned));
        for (key, value) in node.entries().iter().filter(|(key, _)| !matches!(key.as_str(), "path")) {
            let whole = key == "split" && value.text() == Some("train");
            if !whole && !value.is_null() {
                draft.leave(&format!("datasets.{key}"), &show(value), "all rows of the path are read");
            }
        }
    }
    for path in paths {
        let mut table = Table::new();
        named(draft, &mut table, &path);
        if let Some(field) = given.text("dataset_text_field").filter(|field| *field != "text") {
            table.insert("template".into(), format!("|||{{{{ {field} }}}}").into());
        }
        draft.data.push(table);
    }
    for key in ["dataset_config", "dataset_train_split", "dataset_test_split"] {
        if let Some(value) = given.text(key).filter(|value| !(key == "dataset_train_split" && *value == "train")) {
            let reason = match key {
                "dataset_test_split" => "set data.validation to its file",
                _ => "all rows of the path are read; export the part that is meant as a file",
            };
            draft.leave(key, value, reason);
        }
    }
    match given.number("test_split_size")? {
        Some(share) if (0.0..1.0).contains(&share) => draft.set("split", "validation", share),
        _ => draft.set("split", "validation", 0.0),
    }
    draft.set("split", "test", 0.0);
    for key in ["completion_only_loss", "train_on_inputs"] {
        if given.flag(key) == Some(key == "train_on_inputs") {
            draft.leave(key, given.text(key).unwrap_or_default(), "the loss is on completion tokens only");
        }
    }
    if given.flag("assistant_only_loss") != Some(true) {
        draft.note("of conversations, TRL trains on every token unless assistant_only_loss is set; here only the turns of data.roles_to_train are");
    }
    Ok(())
}
