//! All mistakes of a file that does not have the form of a mesh, beside the first, at which reading ends.

use weft_xds::bootstrap::ConfigError;
use weft_xds::located::Located;
use weft_xds::recover::{MISSING, Recovered, recover};

use super::check::{self, Reference};
use super::file::ReferencedFiles;
use super::raw;

/// Where services are listed in the file.
const SERVICES: &str = "services";

/// All mistakes of a file, by line: those of its form, and those in what could be read of it. `first` is
/// the one at which reading ended.
pub(super) fn all(text: &str, files: &ReferencedFiles, first: ConfigError) -> Vec<ConfigError> {
    let Ok(file) = Located::parse_with_repetitions(text) else {
        // Without its syntax nothing else of it is known.
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
    if let Some(Err(mistakes)) = checked {
        for mistake in mistakes {
            let path = found.path_in_file(&mistake.path);
            let may_be_good = match &mistake.refers_to {
                Some(Reference::Service(service)) => may_be_good(service, &names, &found),
                Some(Reference::Issuer(issuer)) => {
                    found.is_omitted(&format!("security.issuers[{issuer:?}]"))
                }
                None => false,
            };
            if !may_be_good && !found.is_omitted(&path) {
                problems.push(problem(&path, &mistake.reason));
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

/// Whether a reference to a service or its ports may be good once the mistakes of the services are corrected. `names`
/// are those of the services in the file.
fn may_be_good(service: &str, names: &[Option<String>], found: &Recovered<raw::RawMesh>) -> bool {
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
