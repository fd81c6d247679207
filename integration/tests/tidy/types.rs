//! One name, one meaning: a type name exists once in the product's crates and in the test library.

use std::collections::BTreeMap;

use super::tree::{File, code, is_word};

/// What defines a type.
const KEYWORDS: [&str; 5] = ["struct", "enum", "union", "trait", "type"];

/// Type names that several files define.
pub(crate) fn repeated_type_names(files: &[File]) -> Vec<String> {
    let mut places = BTreeMap::<String, Vec<String>>::new();
    let product = files.iter().filter(|file| file.is_rust() && !is_for_tests(file));
    for file in product {
        for (number, line) in file.numbered().take(file.lines_before_tests()) {
            if let Some(name) = defined_type(line) {
                places.entry(name).or_default().push(format!("{}:{number}", file.path));
            }
        }
    }
    let repeated = places.into_iter().filter(|(_, places)| places.len() > 1);
    repeated
        .map(|(name, places)| {
            format!("{name} is defined {} times: {}", places.len(), places.join(", "))
        })
        .collect()
}

/// Test files, and modules whose files are compiled for tests only.
fn is_for_tests(file: &File) -> bool {
    file.is_wholly_tests()
        || file.path.ends_with("_tests.rs")
        || file.path.contains("/fuzz/")
        || file.path.ends_with("/test_request.rs")
}

/// The name of the type that a line defines at the top level of its file.
fn defined_type(line: &str) -> Option<String> {
    if line.starts_with(char::is_whitespace) {
        return None;
    }
    let code = code(line);
    let mut words = code.split_whitespace().skip_while(|word| word.starts_with("pub"));
    let keyword = words.next()?;
    if !KEYWORDS.contains(&keyword) {
        return None;
    }
    let name: String = words.next()?.chars().take_while(|c| is_word(*c)).collect();
    (!name.is_empty()).then_some(name)
}

#[test]
fn type_names_exist_once() {
    super::hold(&repeated_type_names(&super::tree()));
}
