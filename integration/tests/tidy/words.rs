//! The words of comments, strings and Markdown: plain technical English.
//!
//! `archaic_words.txt` holds regular expressions of wording that readers stumble over, a line each: archaic words,
//! and phrases that stand for a technical term. A test name must say what it tests, so it must not begin with a pronoun.

use std::collections::BTreeMap;

use regex::Regex;

use super::tree::File;

/// Expressions of the words, a line each.
const WORDS: &str = include_str!("archaic_words.txt");
/// The most hits per 10,000 words of a kind of text. Comparable projects have 4 to 7.
const RATE_LIMIT: usize = 4;
/// Pronouns that a test name must not begin with.
const PRONOUNS: [&str; 11] = [
    "it_",
    "who_",
    "whoever_",
    "whom_",
    "what_",
    "whatever_",
    "that_",
    "those_",
    "they_",
    "nobody_",
    "somebody_",
];

/// What a text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum TextKind {
    Comment,
    String,
    Markdown,
}

/// A text that a person reads, and the line that it begins at.
struct Text<'a> {
    kind: TextKind,
    line: usize,
    text: &'a str,
}

/// The comments and strings of Rust code, or the whole of a Markdown file.
fn texts(file: &File) -> Vec<Text<'_>> {
    if file.path.ends_with(".md") {
        return vec![Text { kind: TextKind::Markdown, line: 1, text: &file.text }];
    }
    if !file.is_rust() {
        return Vec::new();
    }
    let token = Regex::new(r##"(?s)//[^\n]*|/\*.*?\*/|r#*".*?"#*|b?"(?:\\.|[^"\\])*""##);
    let token = token.expect("the expression is valid");
    let found = token.find_iter(&file.text).map(|token| Text {
        kind: if token.as_str().starts_with('/') { TextKind::Comment } else { TextKind::String },
        line: file.text.get(..token.start()).map_or(0, |before| before.matches('\n').count()) + 1,
        text: token.as_str(),
    });
    found.collect()
}

/// Uses of archaic words, where a kind of text has more of them than [`RATE_LIMIT`].
pub(crate) fn archaic_words(files: &[File]) -> Vec<String> {
    let expressions: Vec<Regex> = WORDS
        .lines()
        .map(|line| Regex::new(&format!("(?i){line}")).expect("every line is an expression"))
        .collect();
    let mut words = BTreeMap::<TextKind, usize>::new();
    let mut hits = BTreeMap::<TextKind, Vec<String>>::new();
    for file in files {
        for text in texts(file) {
            *words.entry(text.kind).or_default() += text.text.split_whitespace().count();
            for found in expressions.iter().flat_map(|e| e.find_iter(text.text)) {
                let before = text.text.get(..found.start()).map_or(0, |b| b.matches('\n').count());
                let hit = format!(
                    "{}:{}: {:?}: name the actor and the action in the field's words",
                    file.path,
                    text.line + before,
                    found.as_str()
                );
                hits.entry(text.kind).or_default().push(hit);
            }
        }
    }
    let is_beyond = |kind: &TextKind, count: usize| {
        let words = words.get(kind).copied().unwrap_or_default();
        10_000 * count > RATE_LIMIT * words
    };
    hits.into_iter()
        .filter(|(kind, hits)| is_beyond(kind, hits.len()))
        .flat_map(|(_, h)| h)
        .collect()
}

/// Names of tests that begin with a pronoun.
pub(crate) fn vague_test_names(files: &[File]) -> Vec<String> {
    let test = Regex::new(r"#\[(?:tokio::)?test[^\]]*\]\s*(?:#\[[^\]]*\]\s*)*(?:async )?fn (\w+)");
    let test = test.expect("the expression is valid");
    let rust = files.iter().filter(|file| file.is_rust());
    rust.flat_map(|file| {
        let names = test.captures_iter(&file.text).filter_map(|found| found.get(1));
        let vague = names.filter(|name| PRONOUNS.iter().any(|p| name.as_str().starts_with(p)));
        vague
            .map(|name| {
                format!("{}: {}: name the subject and the result", file.path, name.as_str())
            })
            .collect::<Vec<_>>()
    })
    .collect()
}

#[test]
fn texts_are_in_plain_words() {
    super::hold(&archaic_words(&super::tree()));
}

#[test]
fn test_names_begin_with_their_subject() {
    super::hold(&vague_test_names(&super::tree()));
}
