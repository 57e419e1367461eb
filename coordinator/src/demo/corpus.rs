//! The demo's corpus: eight instruction tasks and plain text, made from a seed.
//!
//! A tenth of all argument strings, chosen by their hash and so the same for every seed, is never trained on: neither as
//! an argument, nor as a whole answer, nor as a word of the plain text. Tests ask for these only.

use super::words::{Templates, ADJECTIVES, AVOIDED, CONSONANTS, LANGUAGES, NAMES, TASKS, THINGS, TOPICS, VOWELS, WHEN};
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Plain texts to pretrain on.
const TEXTS: usize = 12_000;
/// Of them, those that are trained on again beside the instructions, against forgetting.
const REPLAYED: usize = 1_312;
/// Plain texts to test on.
const TEST_TEXTS: usize = 300;
/// Test rows for each task and kind of template.
const TEST_ROWS: usize = 200;

/// Name of the data table with plain text.
pub const TEXT: &str = "text";

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub prompt: String,
    pub completion: String,
}

/// What the model is tested on, by task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tests {
    /// New arguments in templates of the training rows.
    pub known: BTreeMap<&'static str, Vec<Row>>,
    /// New arguments in a new template.
    pub unseen: BTreeMap<&'static str, Vec<Row>>,
}

/// Everything, before it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    pub texts: Vec<String>,
    pub test_texts: Vec<String>,
    pub rows: BTreeMap<&'static str, Vec<Row>>,
    pub tests: Tests,
}

/// Where the files are.
#[derive(Debug, Clone)]
pub struct Files {
    pub texts: PathBuf,
    pub replayed: PathBuf,
    pub test_texts: PathBuf,
    /// Name and file of every task, in the order of [`TASKS`].
    pub tasks: Vec<(&'static str, PathBuf)>,
    /// Test rows of known templates, by task, for the loss.
    pub validation: Vec<PathBuf>,
}

impl Corpus {
    pub fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let texts = (0..TEXTS).map(|_| text(&mut chance, false)).collect();
        let mut rows = BTreeMap::new();
        for task in TASKS {
            let made = (0..task.rows).map(|i| row(&mut chance, task, i, false, task.known[i % 10]));
            rows.insert(task.task, made.collect());
        }
        let test_texts = (0..TEST_TEXTS).map(|_| text(&mut chance, true)).collect();
        let mut tests = Tests::default();
        for task in TASKS {
            let known = (0..TEST_ROWS).map(|i| row(&mut chance, task, i, true, task.known[i % 10])).collect();
            let unseen = (0..TEST_ROWS).map(|i| row(&mut chance, task, i, true, task.unseen)).collect();
            tests.known.insert(task.task, known);
            tests.unseen.insert(task.task, unseen);
        }
        Corpus { texts, test_texts, rows, tests }
    }

    /// Writes JSON Lines files into `directory`.
    pub fn write(&self, directory: &Path) -> io::Result<Files> {
        fs::create_dir_all(directory.join("validation"))?;
        let texts = |name: &str, texts: &[String]| {
            let lines: String = texts.iter().map(|t| format!("{}\n", json!({"text": t}))).collect();
            let path = directory.join(name);
            fs::write(&path, lines).map(|()| path)
        };
        let rows = |name: String, rows: &[Row]| {
            let line = |r: &Row| format!("{}\n", json!({"prompt": r.prompt, "completion": r.completion}));
            let path = directory.join(name);
            fs::write(&path, rows.iter().map(line).collect::<String>()).map(|()| path)
        };
        let mut files = Files {
            texts: texts("texts.jsonl", &self.texts)?,
            replayed: texts("replayed.jsonl", &self.texts[..REPLAYED.min(self.texts.len())])?,
            test_texts: texts("test-texts.jsonl", &self.test_texts)?,
            tasks: Vec::new(),
            validation: Vec::new(),
        };
        for Templates { task, .. } in TASKS {
            files.tasks.push((task, rows(format!("{task}.jsonl"), &self.rows[task])?));
            files.validation.push(rows(format!("validation/{task}.jsonl"), &self.tests.known[task])?);
        }
        Ok(files)
    }
}

/// Whether an argument is for tests: a tenth of all strings, by FNV-1a.
pub fn held(argument: &str) -> bool {
    let hash =
        argument.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    (hash >> 32) % 10 == 0
}

/// Row `i` of a task. The label goes by `i / 10`, the template by `i % 10`: balanced, and neither tells the other.
fn row(chance: &mut Chance, task: &Templates, i: usize, test: bool, template: &str) -> Row {
    loop {
        let (argument, answer) = pair(chance, task.task, i / 10);
        let leaks = !test && matches!(task.task, "reverse" | "next") && held(&answer);
        if held(&argument) == test && !leaks {
            return Row { prompt: template.replace("{x}", &argument) + "\n", completion: answer };
        }
    }
}

fn pair(chance: &mut Chance, task: &str, label: usize) -> (String, String) {
    match task {
        "next" => {
            let mut n = chance.between(1000, 9998);
            if n < 9990 && chance.below(4) == 0 {
                // More carries than chance alone would bring.
                n = n / 10 * 10 + 9;
            }
            (n.to_string(), (n + 1).to_string())
        }
        "largest" => {
            let most = 3 + label % 7;
            let mut digits = chance.sample(&(0..most).collect::<Vec<_>>(), 3);
            digits.push(most);
            chance.shuffle(&mut digits);
            let list: Vec<String> = digits.iter().map(usize::to_string).collect();
            (list.join(", "), most.to_string())
        }
        "topic" => {
            let topic = &TOPICS[label % TOPICS.len()];
            let (name, verb) = (chance.choose(NAMES), chance.choose(topic.verbs));
            let (adjective, object) = (chance.choose(ADJECTIVES), chance.choose(topic.objects));
            let (place, when) = (chance.choose(topic.places), chance.choose(WHEN));
            (format!("{name} {verb} the {adjective} {object} near the {place} {when}."), topic.name.into())
        }
        "language" => {
            let (name, slots) = &LANGUAGES[label % LANGUAGES.len()];
            let words: Vec<&str> = slots.iter().map(|slot| chance.choose(slot)).collect();
            (capitalized(&format!("{}.", words.join(" "))), (*name).into())
        }
        _ => {
            let mut argument = word(chance);
            while task == "reverse" && argument.len() > 4 {
                argument = word(chance);
            }
            let answer = match task {
                "repeat" => format!("{argument} {argument}"),
                "reverse" => argument.chars().rev().collect(),
                "spell" => argument.chars().map(String::from).collect::<Vec<_>>().join("-"),
                _ => argument.chars().last().map(String::from).unwrap_or_default(),
            };
            (argument, answer)
        }
    }
}

/// Three to five different capitals, vowels and consonants in turn: a word that nobody has seen.
fn word(chance: &mut Chance) -> String {
    loop {
        let length = chance.between(3, 5);
        let vowel_first = chance.below(2);
        let (consonants, vowels) = (chance.sample(CONSONANTS, 3), chance.sample(VOWELS, 3));
        let letter = |i: usize| char::from(if (i + vowel_first) % 2 == 1 { vowels[i / 2] } else { consonants[i / 2] });
        let word: String = (0..length).map(letter).collect();
        let turned: String = word.chars().rev().collect();
        if !AVOIDED.contains(&word.as_str()) && !AVOIDED.contains(&turned.as_str()) {
            return word;
        }
    }
}

/// Two or three sentences in which names, words and numbers come back, as they do in stories.
fn text(chance: &mut Chance, test: bool) -> String {
    let names = chance.sample(NAMES, 2);
    let (n, m) = (names[0], names[1]);
    let form = chance.below(6);
    let thing = chance.choose(THINGS);
    let mut w = || loop {
        let word = word(chance);
        if held(&word) == test {
            return word;
        }
    };
    match form {
        0 => {
            let w = w();
            let (adjective, when) = (chance.choose(ADJECTIVES), capitalized(chance.choose(WHEN)));
            format!(
                "{n} has a {adjective} {thing} called {w}. {when} {m} saw {w} too. {m} likes {w}, and {w} likes {n}."
            )
        }
        1 => {
            let list = format!("{}, {} and {}", w(), w(), w());
            format!("{n} went to {list}. {m} went to {list} too.")
        }
        2 => {
            let w = w();
            let number = chance.between(100, 999);
            format!("{n} lives in {w} at number {number}. {m} sent a letter to number {number} in {w}.")
        }
        3 => {
            let (w, u) = (w(), w());
            format!("The {thing} of {n} is {w}. The {thing} of {m} is {u}. {n} calls {w} and {m} calls {u}.")
        }
        4 => {
            let topic = &TOPICS[chance.below(TOPICS.len())];
            let (object, place) = (chance.choose(topic.objects), chance.choose(topic.places));
            let (first, second) = (chance.choose(topic.verbs), chance.choose(topic.verbs));
            let (adjective, when) = (chance.choose(ADJECTIVES), chance.choose(WHEN));
            format!("{n} {first} the {object} near the {place}. {m} {second} the {adjective} {object} {when}.")
        }
        _ => {
            let w = w();
            format!("{w}, {w}, {w}! sang {n}. {m} sang {w}, {w} and {w}.")
        }
    }
}

fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map(|first| first.to_uppercase().chain(characters).collect()).unwrap_or_default()
}

/// Seeded choices.
struct Chance(ChaCha8Rng);

impl Chance {
    fn new(seed: u64) -> Self {
        Chance(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in 0..n, near enough: n is tiny beside 2^64.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in first..=last.
    fn between(&mut self, first: usize, last: usize) -> usize {
        first + self.below(last - first + 1)
    }

    fn choose<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    /// `count` different elements.
    fn sample<T: Copy>(&mut self, from: &[T], count: usize) -> Vec<T> {
        let mut pool = from.to_vec();
        (0..count).map(|_| pool.swap_remove(self.below(pool.len()))).collect()
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus_is_a_function_of_the_seed() {
        assert_eq!(Corpus::new(3), Corpus::new(3));
        assert_ne!(Corpus::new(3).texts, Corpus::new(4).texts);
    }

    #[test]
    fn rows_fill_whole_steps() {
        let corpus = Corpus::new(0);
        let rows: usize = corpus.rows.values().map(Vec::len).sum();
        assert_eq!((rows + REPLAYED) % 64, 0);
        assert_eq!(corpus.texts.len() % 32, 0);
    }

    /// The argument of a prompt, recovered from whichever template fits.
    fn argument(task: &Templates, prompt: &str) -> String {
        let prompt = prompt.trim_end_matches('\n');
        let fits = |template: &str| {
            let (before, after) = template.split_once("{x}")?;
            prompt.strip_prefix(before)?.strip_suffix(after).map(str::to_owned)
        };
        task.known.iter().copied().chain([task.unseen]).filter_map(fits).min_by_key(String::len).unwrap()
    }

    #[test]
    fn no_test_argument_occurs_in_training() {
        let corpus = Corpus::new(0);
        for task in TASKS {
            let trained: std::collections::BTreeSet<String> =
                corpus.rows[task.task].iter().map(|r| argument(task, &r.prompt)).collect();
            for row in corpus.tests.known[task.task].iter().chain(&corpus.tests.unseen[task.task]) {
                let argument = argument(task, &row.prompt);
                assert!(held(&argument), "{argument}");
                assert!(!trained.contains(&argument), "{argument}");
            }
            assert!(trained.iter().all(|a| !held(a)));
        }
        let words = corpus.texts.iter().flat_map(|t| t.split(|c: char| !c.is_ascii_uppercase()));
        assert!(words.filter(|w| w.len() >= 3).all(|w| !held(w)));
    }

    #[test]
    fn answers_are_right_and_labels_balanced() {
        let corpus = Corpus::new(0);
        let of = |name: &str| TASKS.iter().find(|t| t.task == name).unwrap();
        for (name, check) in [
            ("reverse", (|a: &str| a.chars().rev().collect::<String>()) as fn(&str) -> String),
            ("next", |a| (a.parse::<u32>().unwrap() + 1).to_string()),
            ("last", |a| a[a.len() - 1..].to_string()),
            ("repeat", |a| format!("{a} {a}")),
            ("largest", |a| a.split(", ").max().unwrap().to_string()),
        ] {
            for row in &corpus.rows[name] {
                assert_eq!(row.completion, check(&argument(of(name), &row.prompt)), "{}", row.prompt);
            }
        }
        for (name, labels) in [("topic", 5), ("language", 5), ("largest", 7)] {
            let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
            for row in &corpus.rows[name] {
                *counts.entry(&row.completion).or_default() += 1;
            }
            assert_eq!(counts.len(), labels);
            let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
            assert!(most - least <= 10, "{name}: {counts:?}");
        }
    }
}
