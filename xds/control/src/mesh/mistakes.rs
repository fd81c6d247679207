//! All mistakes of a file that does not have the form of a mesh, beside the first, at which reading ends.

use weft_xds::bootstrap::Problem;
use weft_xds::located::Located;
use weft_xds::recover::{Recovered, recover};

use super::file::NamedFiles;
use super::{check, raw};

/// Where services are listed in the file.
const SERVICES: &str = "services";

/// All mistakes of a file, by line: those of its form, and those in what could be read of it. `first` is
/// the one at which reading ended.
pub(super) fn all(text: &str, files: &NamedFiles, first: Problem) -> Vec<Problem> {
    let Ok(file) = Located::parse_with_repetitions(text) else {
        // Without its syntax nothing else of it is known.
        return vec![first];
    };
    let mut found: Recovered<raw::Mesh> = recover(&file);
    let problem = |path: &str, reason: &str| {
        let place = if path.is_empty() { String::new() } else { format!("{path}: ") };
        Problem { line: file.line_of(path), text: format!("{place}{reason}") }
    };
    let mut problems: Vec<Problem> =
        found.mistakes.iter().map(|(path, reason)| problem(path, reason)).collect();
    if problems.iter().all(|problem| problem.line != first.line) {
        problems.push(first);
    }
    let checked = found.value.take().map(|raw| check::check(&raw, files));
    if let Some(Err(mistakes)) = checked {
        for mistake in mistakes {
            let path = found.path_in_file(&mistake.path);
            // A reference to a service that was left out is not reported.
            let may_refer = mistake.needs_services && found.is_incomplete(SERVICES);
            if !may_refer && !found.is_without(&path) {
                problems.push(problem(&path, &mistake.reason));
            }
        }
    }
    problems.sort_by_key(|problem| problem.line);
    problems
}
