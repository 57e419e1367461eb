//! The kinds of findings: their stable names, and what the configuration makes of each.

use serde::{Serialize, Serializer};
use unisono_configs::run::{Gate, Level};

/// One entry for each key of `[gate]` that is a level; docs/data.md explains each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    EndOfText,
    SpecialTokens,
    TemplateDrift,
    UnrenderedTemplate,
    UnevenSeam,
    GluedSeam,
    EmptyTurns,
    PromptEcho,
    BrokenText,
    Duplicates,
    NearDuplicates,
    RepeatedAcrossTasks,
    PlaceholderAnswers,
    SharedPrompts,
    SingleLabel,
    SkewedLabels,
    LabelVariants,
    SmallSplit,
    SplitLeak,
    IdenticalSplit,
    SharedSources,
    Truncated,
    MissingEos,
    DoubledEos,
    DoubledBos,
    UnknownTokens,
}

impl Kind {
    pub const ALL: [Kind; 26] = [
        Kind::EndOfText,
        Kind::SpecialTokens,
        Kind::TemplateDrift,
        Kind::UnrenderedTemplate,
        Kind::UnevenSeam,
        Kind::GluedSeam,
        Kind::EmptyTurns,
        Kind::PromptEcho,
        Kind::BrokenText,
        Kind::Duplicates,
        Kind::NearDuplicates,
        Kind::RepeatedAcrossTasks,
        Kind::PlaceholderAnswers,
        Kind::SharedPrompts,
        Kind::SingleLabel,
        Kind::SkewedLabels,
        Kind::LabelVariants,
        Kind::SmallSplit,
        Kind::SplitLeak,
        Kind::IdenticalSplit,
        Kind::SharedSources,
        Kind::Truncated,
        Kind::MissingEos,
        Kind::DoubledEos,
        Kind::DoubledBos,
        Kind::UnknownTokens,
    ];

    /// The name for people and scripts; with `_` for `-`, its key in `[gate]`.
    pub fn id(self) -> &'static str {
        match self {
            Kind::EndOfText => "end-of-text",
            Kind::SpecialTokens => "special-tokens",
            Kind::TemplateDrift => "template-drift",
            Kind::UnrenderedTemplate => "unrendered-template",
            Kind::UnevenSeam => "uneven-seam",
            Kind::GluedSeam => "glued-seam",
            Kind::EmptyTurns => "empty-turns",
            Kind::PromptEcho => "prompt-echo",
            Kind::BrokenText => "broken-text",
            Kind::Duplicates => "duplicates",
            Kind::NearDuplicates => "near-duplicates",
            Kind::RepeatedAcrossTasks => "repeated-across-tasks",
            Kind::PlaceholderAnswers => "placeholder-answers",
            Kind::SharedPrompts => "shared-prompts",
            Kind::SingleLabel => "single-label",
            Kind::SkewedLabels => "skewed-labels",
            Kind::LabelVariants => "label-variants",
            Kind::SmallSplit => "small-split",
            Kind::SplitLeak => "split-leak",
            Kind::IdenticalSplit => "identical-split",
            Kind::SharedSources => "shared-sources",
            Kind::Truncated => "truncated",
            Kind::MissingEos => "missing-eos",
            Kind::DoubledEos => "doubled-eos",
            Kind::DoubledBos => "doubled-bos",
            Kind::UnknownTokens => "unknown-tokens",
        }
    }

    /// What is wrong.
    pub fn title(self) -> &'static str {
        match self {
            Kind::EndOfText => "end-of-text tokens are written out as text",
            Kind::SpecialTokens => "special tokens of the tokenizer are written out as text",
            Kind::TemplateDrift => "markers of a chat template that is not this model's",
            Kind::UnrenderedTemplate => "template code is left in the text",
            Kind::UnevenSeam => "some rows join prompt and completion unlike the others",
            Kind::GluedSeam => "completions are glued to the last word of their prompts",
            Kind::EmptyTurns => "empty prompts or messages",
            Kind::PromptEcho => "completions repeat their prompt, which the model is then trained to do",
            Kind::BrokenText => {
                "control characters, replacement characters, or text decoded with the wrong encoding (â€™ for ’)"
            }
            Kind::Duplicates => "rows occur several times in a task and are trained more often",
            Kind::NearDuplicates => "rows differ from an earlier one in case or white space only",
            Kind::RepeatedAcrossTasks => "rows occur in several tasks",
            Kind::PlaceholderAnswers => "answers stand for a missing value (nan, None, null)",
            Kind::SharedPrompts => {
                "rows share their prompt with a row that answers otherwise, so no answer is right for both"
            }
            Kind::SingleLabel => "tasks that answer one thing only teach nothing but that",
            Kind::SkewedLabels => "tasks that nearly always answer the same are learnt by always saying so",
            Kind::LabelVariants => "answers in several spellings",
            Kind::SmallSplit => {
                "tasks with too few rows to hold one out: nothing will be known of how well they are learnt"
            }
            Kind::SplitLeak => "the source text of held-out rows is trained on, too, so their loss is too good",
            Kind::IdenticalSplit => "held-out rows are trained on as they are, so their loss says nothing",
            Kind::SharedSources => "tasks are made of the same source texts, and each is split by itself",
            Kind::Truncated => "rows are longer than train.max_length and lose their end, end of text included",
            Kind::MissingEos => "rows do not end with an end-of-text token, so the model never learns to stop",
            Kind::DoubledEos => "an end-of-text token in the midst of what is trained on",
            Kind::DoubledBos => "rows begin with two beginning-of-text tokens",
            Kind::UnknownTokens => "text that the tokenizer does not know becomes its unknown token",
        }
    }

    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Kind::EndOfText => "remove them: each completion is ended with the model's own token",
            Kind::SpecialTokens => "remove them, or give the conversation as messages",
            Kind::TemplateDrift => "give the conversation as messages, so that the model's own template is used",
            Kind::UnrenderedTemplate => "render the template, or set data.template",
            Kind::UnevenSeam => "write the end of every prompt and the beginning of every completion alike",
            Kind::GluedSeam => "end prompts with white space, or begin completions with it",
            Kind::EmptyTurns => {
                "remove these rows; plain texts belong into a table of their own with format = \"text\""
            }
            Kind::PromptEcho => "leave the prompt out of the completion",
            Kind::BrokenText => "write the file again as UTF-8",
            Kind::Duplicates => "remove the repeats, or raise gate.repeats if they are meant",
            Kind::NearDuplicates => "remove the repeats",
            Kind::RepeatedAcrossTasks => "keep them in one",
            Kind::PlaceholderAnswers => "remove these rows",
            Kind::SharedPrompts => {
                "add to the prompt what tells them apart, or set gate.shared_prompts = \"off\" where several answers are meant"
            }
            Kind::SingleLabel => "add rows with other answers, or leave the task out",
            Kind::SkewedLabels => "add rows with the other answers",
            Kind::LabelVariants => "write one of them throughout",
            Kind::SmallSplit => "add rows, raise the share, or name a file of held-out rows",
            Kind::SplitLeak => "set data.group_by to a field that names the source, or hold out files of your own",
            Kind::IdenticalSplit => "name another file, or hold out a share",
            Kind::SharedSources => {
                "set data.group_by in both to a field that names the source, or hold out files of your own"
            }
            Kind::Truncated => "raise train.max_length, or leave these rows out",
            Kind::MissingEos => {
                "let the chat template put it inside of what is trained on, or add its id to eos_token_id in generation_config.json"
            }
            Kind::DoubledEos => "remove it from the text: one is appended",
            Kind::DoubledBos => "remove the one written in the prompt: the tokenizer puts its own",
            Kind::UnknownTokens => "write it with other characters, or take the model's own tokenizer",
        }
    }

    /// Its key in `[gate]`.
    pub fn key(self) -> String {
        self.id().replace('-', "_")
    }

    /// What the configuration makes of it.
    pub fn level(self, gate: &Gate) -> Level {
        match self {
            Kind::EndOfText => gate.end_of_text,
            Kind::SpecialTokens => gate.special_tokens,
            Kind::TemplateDrift => gate.template_drift,
            Kind::UnrenderedTemplate => gate.unrendered_template,
            Kind::UnevenSeam => gate.uneven_seam,
            Kind::GluedSeam => gate.glued_seam,
            Kind::EmptyTurns => gate.empty_turns,
            Kind::PromptEcho => gate.prompt_echo,
            Kind::BrokenText => gate.broken_text,
            Kind::Duplicates => gate.duplicates,
            Kind::NearDuplicates => gate.near_duplicates,
            Kind::RepeatedAcrossTasks => gate.repeated_across_tasks,
            Kind::PlaceholderAnswers => gate.placeholder_answers,
            Kind::SharedPrompts => gate.shared_prompts,
            Kind::SingleLabel => gate.single_label,
            Kind::SkewedLabels => gate.skewed_labels,
            Kind::LabelVariants => gate.label_variants,
            Kind::SmallSplit => gate.small_split,
            Kind::SplitLeak => gate.split_leak,
            Kind::IdenticalSplit => gate.identical_split,
            Kind::SharedSources => gate.shared_sources,
            Kind::Truncated => gate.truncated,
            Kind::MissingEos => gate.missing_eos,
            Kind::DoubledEos => gate.doubled_eos,
            Kind::DoubledBos => gate.doubled_bos,
            Kind::UnknownTokens => gate.unknown_tokens,
        }
    }

    /// The share below which it is a mere note.
    pub fn tolerated(self, gate: &Gate) -> f64 {
        match self {
            Kind::Duplicates | Kind::NearDuplicates | Kind::RepeatedAcrossTasks | Kind::SharedPrompts => gate.repeats,
            Kind::SplitLeak => gate.leaked,
            Kind::SharedSources => gate.repeats,
            Kind::Truncated => gate.cut,
            Kind::SingleLabel | Kind::SkewedLabels | Kind::LabelVariants => 0.0,
            Kind::SmallSplit | Kind::IdenticalSplit => 0.0,
            _ => gate.rare,
        }
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_explained() {
        let page = include_str!("../../../../docs/data.md");
        for kind in Kind::ALL {
            assert!(page.contains(&format!("| `{}` |", kind.id())), "docs/data.md lacks {}", kind.id());
        }
    }

    /// A kind that no key switches, or a key that no kind reads, would never be noticed.
    #[test]
    fn every_kind_follows_its_own_key() {
        for kind in Kind::ALL {
            let key = format!("gate.{}", kind.key());
            let set = [(key.clone(), "off".to_owned())];
            let files = [std::path::PathBuf::from("/d.jsonl")];
            let config = unisono_configs::run::RunConfig::for_files("/m".as_ref(), &files, &set).unwrap();
            let off: Vec<Kind> = Kind::ALL.into_iter().filter(|k| k.level(&config.gate) == Level::Off).collect();
            assert_eq!(off, [kind], "{key}");
        }
    }
}
