//! The words and templates of the demo's corpus.

/// Given names in plain texts and in sentences.
pub const NAMES: &[&str] =
    &["Anna", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irma", "Jonas", "Lena", "Marco"];

pub const CONSONANTS: &[u8] = b"BCDFGHJKLMNPQRSTVWXZ";
pub const VOWELS: &[u8] = b"AEIOU";

/// Not made up, forwards or backwards.
pub const AVOIDED: &[&str] = &["NAZI", "RAPE", "RAPED", "FAG", "CUM", "TIT", "PEDO", "SEX", "HOMO"];

/// A kind of instruction.
#[derive(Debug)]
pub struct Templates {
    pub task: &'static str,
    /// Rows to train on; what is harder gets more.
    pub rows: usize,
    /// `{x}` is the argument.
    pub known: [&'static str; 10],
    /// Never trained on.
    pub unseen: &'static str,
}

pub const TASKS: &[Templates] = &[
    Templates {
        task: "repeat",
        rows: 6000,
        known: [
            "Repeat {x} twice.",
            "Repeat the word {x} two times.",
            "Please repeat the word {x} twice.",
            "Write {x} twice.",
            "Write the word {x} two times.",
            "Please say {x} twice.",
            "Say the word {x} two times.",
            "Twice, please: {x}",
            "Write this word twice: {x}",
            "What is {x} said twice?",
        ],
        unseen: "Please write the word {x} twice.",
    },
    Templates {
        task: "reverse",
        rows: 9000,
        known: [
            "Reverse {x}.",
            "Reverse the word {x}.",
            "Please reverse the word {x}.",
            "Write {x} backwards.",
            "Write the word {x} in reverse.",
            "Please say {x} backwards.",
            "Say the word {x} in reverse.",
            "Backwards, please: {x}",
            "Write this word backwards: {x}",
            "What is {x} said backwards?",
        ],
        unseen: "Please write the word {x} backwards.",
    },
    Templates {
        task: "spell",
        rows: 4000,
        known: [
            "Spell {x}.",
            "Spell the word {x} with dashes.",
            "Please spell the word {x}.",
            "Write {x} with dashes.",
            "Write the word {x} letter by letter.",
            "Please say {x} letter by letter.",
            "Say the word {x} with dashes.",
            "With dashes, please: {x}",
            "Spell this word with dashes: {x}",
            "How do you spell {x}?",
        ],
        unseen: "Please write the word {x} with dashes.",
    },
    Templates {
        task: "last",
        rows: 4000,
        known: [
            "What is the last letter of {x}?",
            "What is the last letter in the word {x}?",
            "Name the last letter of the word {x}.",
            "Which letter ends {x}?",
            "Which letter comes last in {x}?",
            "Give the last letter of {x}.",
            "Last letter, please: {x}",
            "Find the last letter of this word: {x}",
            "The word {x} ends with which letter?",
            "Please name the last letter in {x}.",
        ],
        unseen: "Which letter is the last in the word {x}?",
    },
    Templates {
        task: "next",
        rows: 11000,
        known: [
            "What number comes after {x}?",
            "Which number follows {x}?",
            "Add one to {x}.",
            "Please add one to the number {x}.",
            "Count on by one from {x}.",
            "Please give the number after {x}.",
            "What is {x} plus one?",
            "Number after this one, please: {x}",
            "Which number is one more than {x}?",
            "After {x} comes which number?",
        ],
        unseen: "What number is one more than {x}?",
    },
    Templates {
        task: "largest",
        rows: 4000,
        known: [
            "What is the largest of {x}?",
            "What is the biggest digit in {x}?",
            "Name the largest of the digits {x}.",
            "Which digit is the largest: {x}",
            "Which is the biggest of {x}?",
            "Find the largest digit in {x}.",
            "Biggest digit, please: {x}",
            "Give the largest digit: {x}",
            "Which of the digits {x} is the biggest?",
            "Please name the biggest of {x}.",
        ],
        unseen: "Which of the digits {x} is the largest?",
    },
    Templates {
        task: "topic",
        rows: 3000,
        known: [
            "What is the topic of this sentence? {x}",
            "Name the topic: {x}",
            "{x} What is this about?",
            "Give the topic of the sentence. {x}",
            "{x} Which topic is this?",
            "This sentence is about what? {x}",
            "{x} Name the topic.",
            "Topic, please: {x}",
            "Find the topic of this sentence. {x}",
            "{x} What is the sentence about?",
        ],
        unseen: "{x} What is the topic?",
    },
    Templates {
        task: "language",
        rows: 3000,
        known: [
            "What language is this? {x}",
            "Name the language: {x}",
            "{x} Which language is it?",
            "Which language is this sentence in? {x}",
            "Give the language of the sentence. {x}",
            "{x} In what language is this?",
            "{x} Name the language.",
            "Language, please: {x}",
            "Find the language of this sentence. {x}",
            "{x} What language is the sentence in?",
        ],
        unseen: "{x} What is the language?",
    },
];

/// A topic: what one does, with what, and where.
#[derive(Debug)]
pub struct Topic {
    pub name: &'static str,
    pub verbs: &'static [&'static str],
    pub objects: &'static [&'static str],
    pub places: &'static [&'static str],
}

pub const TOPICS: &[Topic] = &[
    Topic {
        name: "animals",
        verbs: &["fed", "petted", "chased", "washed"],
        objects: &["horse", "goat", "puppy", "kitten", "rabbit", "donkey", "duck", "sheep"],
        places: &["barn", "stable", "kennel", "meadow"],
    },
    Topic {
        name: "food",
        verbs: &["cooked", "baked", "tasted", "ate"],
        objects: &["soup", "bread", "pasta", "cake", "rice", "salad", "pizza", "stew"],
        places: &["kitchen", "bakery", "cafe", "oven"],
    },
    Topic {
        name: "music",
        verbs: &["played", "tuned", "heard", "practiced"],
        objects: &["violin", "piano", "drum", "flute", "guitar", "trumpet", "cello", "harp"],
        places: &["concert", "choir", "opera", "studio"],
    },
    Topic {
        name: "sports",
        verbs: &["kicked", "threw", "caught", "won"],
        objects: &["ball", "match", "race", "trophy", "medal", "goal", "final", "game"],
        places: &["stadium", "gym", "pitch", "track"],
    },
    Topic {
        name: "travel",
        verbs: &["missed", "booked", "boarded", "left"],
        objects: &["train", "ferry", "plane", "bus", "ship", "tram", "taxi", "coach"],
        places: &["airport", "station", "harbor", "hotel"],
    },
];

pub const ADJECTIVES: &[&str] = &["old", "new", "small", "big", "red", "fine"];
pub const WHEN: &[&str] = &["today", "last week", "again", "in May", "at noon", "on Monday"];
pub const THINGS: &[&str] = &["boat", "dog", "shop", "horse", "house", "garden", "cat", "ship"];

/// Subject, verb, object and adverb: every language fills the same four slots.
pub const LANGUAGES: &[(&str, [&[&str]; 4])] = &[
    (
        "English",
        [
            &["the boy", "the girl", "my father", "our friend", "a woman", "the doctor"],
            &["sees", "buys", "finds", "wants", "draws", "brings"],
            &["the book", "a flower", "an apple", "the key", "the letter", "a chair"],
            &["now", "often", "slowly", "here", "always"],
        ],
    ),
    (
        "French",
        [
            &["le garçon", "la fille", "mon père", "notre amie", "une femme", "le médecin"],
            &["voit", "achète", "trouve", "veut", "dessine", "apporte"],
            &["le livre", "une fleur", "une pomme", "la clé", "la lettre", "une chaise"],
            &["maintenant", "souvent", "lentement", "ici", "toujours"],
        ],
    ),
    (
        "German",
        [
            &["der Junge", "das Mädchen", "mein Vater", "unser Freund", "eine Frau", "der Arzt"],
            &["sieht", "kauft", "findet", "will", "zeichnet", "bringt"],
            &["das Buch", "eine Blume", "einen Apfel", "den Schlüssel", "den Brief", "einen Stuhl"],
            &["jetzt", "oft", "langsam", "hier", "immer"],
        ],
    ),
    (
        "Spanish",
        [
            &["el niño", "la niña", "mi padre", "nuestro amigo", "una mujer", "el doctor"],
            &["ve", "compra", "encuentra", "quiere", "dibuja", "trae"],
            &["el libro", "una flor", "una manzana", "la llave", "la carta", "una silla"],
            &["ahora", "mucho", "despacio", "aquí", "siempre"],
        ],
    ),
    (
        "Italian",
        [
            &["il ragazzo", "la ragazza", "mio padre", "il nostro amico", "una donna", "il medico"],
            &["vede", "compra", "trova", "vuole", "disegna", "porta"],
            &["il libro", "un fiore", "una mela", "la chiave", "la lettera", "una sedia"],
            &["adesso", "spesso", "piano", "qui", "sempre"],
        ],
    ),
];
