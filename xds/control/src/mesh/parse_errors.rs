//! Finds all errors of a file that cannot be deserialized: the parser stops at the first one.

use weft_xds::located::ConfigError;
use weft_xds::located::Located;
use weft_xds::recover::{MISSING, Recovered, recover};

use super::check::{self, Reference};
use super::raw;
use super::referenced_files::ReferencedFiles;

/// The path of the services in the file.
const SERVICES: &str = "services";

/// All errors of a file, ordered by line: those of deserialization, and those that the checks find in the readable part.
/// `first` is the error at which the parser stopped.
pub(super) fn all(text: &str, files: &ReferencedFiles, first: ConfigError) -> Vec<ConfigError> {
    let Ok(file) = Located::parse_with_repetitions(text) else {
        // Without valid YAML nothing else can be read.
        return vec![first];
    };
    let mut found: Recovered<raw::RawMesh> = recover(&file);
    let problem = |path: &str, reason: &str| {
        let place = if path.is_empty() { String::new() } else { format!("{path}: ") };
        ConfigError { line: file.line_of(path), text: format!("{place}{reason}") }
    };
    let mut problems: Vec<ConfigError> =
        found.mistakes.iter().map(|(path, reason)| problem(path, reason)).collect();
    let is_found = |problem: &ConfigError| problem.line == first.line;
    if !problems.iter().any(is_found) && !is_of_missing_field(&first, &found) {
        problems.push(first);
    }
    let names = file.texts_of(SERVICES, "name");
    let checked = found.value.take().map(|raw| check::check(&raw, files));
    if let Some(Err(errors)) = checked {
        for error in errors {
            let path = found.path_in_file(&error.path);
            let may_be_valid = match &error.refers_to {
                Some(Reference::Service(service)) => may_be_valid(service, &names, &found),
                Some(Reference::Issuer(issuer)) => {
                    found.is_omitted(&format!("security.issuers[{issuer:?}]"))
                }
                None => false,
            };
            if !may_be_valid && !found.is_omitted(&path) {
                problems.push(problem(&path, &error.reason));
            }
        }
    }
    problems.sort_by_key(|problem| problem.line);
    problems
}

/// Whether a problem is that of a missing field which was found as well. The parser reports it at the end of the map
/// that should have the field.
fn is_of_missing_field(problem: &ConfigError, found: &Recovered<raw::RawMesh>) -> bool {
    let Some(field) = problem.text.strip_prefix("missing field `") else { return false };
    let field = field.split('`').next().unwrap_or_default();
    let is_same = |(path, reason): &(String, String)| {
        reason == MISSING && path.rsplit('.').next().unwrap_or_default() == field
    };
    found.mistakes.iter().any(is_same)
}

/// Whether a reference to a service or its ports may be valid once the errors of the services are corrected. `names` are
/// the names of the services in the file.
fn may_be_valid(service: &str, names: &[Option<String>], found: &Recovered<raw::RawMesh>) -> bool {
    let is_incomplete = |index: usize| {
        let path = format!("{SERVICES}[{index}]");
        let fields = ["name", "ports", "meshed"];
        found.is_omitted(&path)
            || fields.iter().any(|field| found.is_incomplete(&format!("{path}.{field}")))
    };
    let mut named =
        (0..).zip(names).filter(|(_, name)| name.as_deref() == Some(service)).peekable();
    match named.peek() {
        Some(_) => named.any(|(index, _)| is_incomplete(index)),
        None => names.contains(&None) || found.is_omitted(SERVICES),
    }
}
