//! Pages of the documentation that are generated from the code.

use std::path::Path;

/// Set, it makes a test write its page instead of comparing it.
const UPDATE: &str = "WEFT_UPDATE_DOCS";

/// Compares a page of `docs/` with what the code generates, or writes the page.
///
/// # Panics
/// The page is outdated.
pub fn assert_page(name: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, generated).expect("the documentation can be written");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let new: Vec<&str> = generated.lines().filter(|line| !kept.contains(line)).collect();
    assert!(generated == kept, "docs/{name} is outdated: run make docs. New lines: {new:#?}");
}
