//! What the gate makes of what it finds in the data, and where a finding begins.

use super::section::Section;
use super::Error;
use serde::{Deserialize, Serialize};

/// What is looked for in the rows before a worker starts. None of it changes the result; docs/data.md explains each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Gate {
    /// End-of-text tokens written out as text.
    pub end_of_text: Level,
    /// Other special tokens of the tokenizer written out as text.
    pub special_tokens: Level,
    /// Markers of a chat template that is not the model's.
    pub template_drift: Level,
    /// Braces of a template that was not rendered.
    pub unrendered_template: Level,
    /// Rows whose prompt ends, or whose completion begins, unlike nearly all others of the task.
    pub uneven_seam: Level,
    /// A completion glued to the last word of its prompt.
    pub glued_seam: Level,
    /// Empty prompts among others, empty turns.
    pub empty_turns: Level,
    /// Completions that repeat their prompt.
    pub prompt_echo: Level,
    /// Control characters, replacement characters, text decoded with the wrong encoding.
    pub broken_text: Level,
    /// Rows that occur several times in a task.
    pub duplicates: Level,
    /// Rows that differ from another in case and white space only.
    pub near_duplicates: Level,
    /// Rows that occur in several tasks.
    pub repeated_across_tasks: Level,
    /// Completions that stand for a missing value: nan, None, null.
    pub placeholder_answers: Level,
    /// One prompt, several completions.
    pub shared_prompts: Level,
    /// Tasks that answer one thing only.
    pub single_label: Level,
    /// Tasks that nearly always answer the same.
    pub skewed_labels: Level,
    /// Answers that differ in case, white space or full stop only.
    pub label_variants: Level,
    /// Tasks with too few rows to hold one out.
    pub small_split: Level,
    /// Held-out rows whose source text is also trained on.
    pub split_leak: Level,
    /// A split of which nine tenths or more are trained on as they are.
    #[serde(default = "refuse")]
    pub identical_split: Level,
    /// Tasks made of the same source texts, as templates of one data set are, but split apart.
    pub shared_sources: Level,
    /// Completions cut at train.max_length.
    pub truncated: Level,
    /// Rows that never teach the model to end its text.
    pub missing_eos: Level,
    /// Rows with an end of text inside of what is trained on.
    pub doubled_eos: Level,
    /// Rows that begin with two beginnings of text.
    pub doubled_bos: Level,
    /// Tokens that stand for text the tokenizer does not know.
    pub unknown_tokens: Level,
    /// Findings about single rows are mere notes below this share of their task's rows.
    pub rare: f64,
    /// Duplicates, near-duplicates and shared prompts are mere notes below this share of their task's rows.
    pub repeats: f64,
    /// The same for duplicates of less than eight words of their own: where there are few things to say, some recur.
    pub short_repeats: f64,
    /// Leaked rows are mere notes below this share of the rows held out.
    pub leaked: f64,
    /// Truncated completions are mere notes below this share of their task's rows.
    pub cut: f64,
    /// Tasks with fewer rows are not judged by their answers.
    pub least_rows: usize,
    /// A task with at most so many different answers is one of labels.
    pub most_labels: usize,
    /// Share of a task's rows from which its most frequent answer is too frequent.
    pub skew: f64,
    /// Share of a text's own word sequences that another must hold to be of the same source.
    pub similarity: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Not looked for.
    Off,
    /// Shown at the start.
    #[default]
    Warn,
    /// Ends the run before a worker starts.
    Refuse,
}

fn refuse() -> Level {
    Level::Refuse
}

impl Default for Gate {
    fn default() -> Self {
        Gate {
            end_of_text: Level::Warn,
            special_tokens: Level::Warn,
            template_drift: Level::Warn,
            unrendered_template: Level::Warn,
            uneven_seam: Level::Warn,
            glued_seam: Level::Warn,
            empty_turns: Level::Warn,
            prompt_echo: Level::Warn,
            broken_text: Level::Warn,
            duplicates: Level::Warn,
            near_duplicates: Level::Warn,
            repeated_across_tasks: Level::Warn,
            placeholder_answers: Level::Warn,
            shared_prompts: Level::Warn,
            single_label: Level::Warn,
            skewed_labels: Level::Warn,
            label_variants: Level::Warn,
            small_split: Level::Warn,
            split_leak: Level::Warn,
            identical_split: Level::Refuse,
            shared_sources: Level::Warn,
            truncated: Level::Warn,
            missing_eos: Level::Warn,
            doubled_eos: Level::Warn,
            doubled_bos: Level::Warn,
            unknown_tokens: Level::Warn,
            rare: 0.001,
            repeats: 0.01,
            short_repeats: 0.25,
            leaked: 0.005,
            cut: 0.05,
            least_rows: 20,
            most_labels: 20,
            skew: 0.95,
            similarity: 0.5,
        }
    }
}

/// The keys of the section, in the order of the reference file.
pub(super) const KEYS: &[&str] = &[
    "end_of_text",
    "special_tokens",
    "template_drift",
    "unrendered_template",
    "uneven_seam",
    "glued_seam",
    "empty_turns",
    "prompt_echo",
    "broken_text",
    "duplicates",
    "near_duplicates",
    "repeated_across_tasks",
    "placeholder_answers",
    "shared_prompts",
    "single_label",
    "skewed_labels",
    "label_variants",
    "small_split",
    "split_leak",
    "identical_split",
    "shared_sources",
    "truncated",
    "missing_eos",
    "doubled_eos",
    "doubled_bos",
    "unknown_tokens",
    "rare",
    "repeats",
    "short_repeats",
    "leaked",
    "cut",
    "least_rows",
    "most_labels",
    "skew",
    "similarity",
];

pub(super) fn read(s: &Section<'_>) -> Result<Gate, Error> {
    let d = Gate::default();
    let words = [("off", Level::Off), ("warn", Level::Warn), ("refuse", Level::Refuse)];
    let level = |key: &str, default| s.choice(key, default, &words);
    let share = |key: &str, default| s.real(key, default, |x| (0.0..=1.0).contains(&x), "a share between 0 and 1");
    Ok(Gate {
        end_of_text: level("end_of_text", d.end_of_text)?,
        special_tokens: level("special_tokens", d.special_tokens)?,
        template_drift: level("template_drift", d.template_drift)?,
        unrendered_template: level("unrendered_template", d.unrendered_template)?,
        uneven_seam: level("uneven_seam", d.uneven_seam)?,
        glued_seam: level("glued_seam", d.glued_seam)?,
        empty_turns: level("empty_turns", d.empty_turns)?,
        prompt_echo: level("prompt_echo", d.prompt_echo)?,
        broken_text: level("broken_text", d.broken_text)?,
        duplicates: level("duplicates", d.duplicates)?,
        near_duplicates: level("near_duplicates", d.near_duplicates)?,
        repeated_across_tasks: level("repeated_across_tasks", d.repeated_across_tasks)?,
        placeholder_answers: level("placeholder_answers", d.placeholder_answers)?,
        shared_prompts: level("shared_prompts", d.shared_prompts)?,
        single_label: level("single_label", d.single_label)?,
        skewed_labels: level("skewed_labels", d.skewed_labels)?,
        label_variants: level("label_variants", d.label_variants)?,
        small_split: level("small_split", d.small_split)?,
        split_leak: level("split_leak", d.split_leak)?,
        identical_split: level("identical_split", d.identical_split)?,
        shared_sources: level("shared_sources", d.shared_sources)?,
        truncated: level("truncated", d.truncated)?,
        missing_eos: level("missing_eos", d.missing_eos)?,
        doubled_eos: level("doubled_eos", d.doubled_eos)?,
        doubled_bos: level("doubled_bos", d.doubled_bos)?,
        unknown_tokens: level("unknown_tokens", d.unknown_tokens)?,
        rare: share("rare", d.rare)?,
        repeats: share("repeats", d.repeats)?,
        short_repeats: share("short_repeats", d.short_repeats)?,
        leaked: share("leaked", d.leaked)?,
        cut: share("cut", d.cut)?,
        least_rows: s.whole("least_rows", d.least_rows as u64, 2)? as usize,
        most_labels: s.whole("most_labels", d.most_labels as u64, 1)? as usize,
        skew: share("skew", d.skew)?,
        similarity: share("similarity", d.similarity)?,
    })
}
