//! Relative links of Markdown files lead to files of the tree.

use std::path::{Component, Path, PathBuf};

use regex::Regex;

use super::tree::File;

/// Relative links to files that are not in the tree.
pub(crate) fn broken_links(files: &[File]) -> Vec<String> {
    let link = Regex::new(r"\]\(([^)#\s]+)").expect("the expression is valid");
    let markdown = files.iter().filter(|file| file.path.ends_with(".md"));
    markdown
        .flat_map(|file| {
            let targets = link.captures_iter(&file.text).filter_map(|found| found.get(1));
            let targets = targets.map(|target| target.as_str());
            let broken = targets.filter(|target| {
                !target.contains("://") && !exists(&resolve(&file.path, target), files)
            });
            broken
                .map(|target| format!("{}: the link to {target} leads nowhere", file.path))
                .collect::<Vec<_>>()
        })
        .collect()
}

fn exists(path: &str, files: &[File]) -> bool {
    files.iter().any(|file| file.path == path || file.path.starts_with(&format!("{path}/")))
}

/// A link of a file as a path from the root of the tree.
fn resolve(file: &str, target: &str) -> String {
    let mut resolved = PathBuf::from(file);
    resolved.pop();
    for part in Path::new(target).components() {
        match part {
            Component::ParentDir => {
                resolved.pop();
            }
            Component::Normal(name) => resolved.push(name),
            _ => {}
        }
    }
    resolved.to_string_lossy().into_owned()
}

#[test]
fn links_lead_to_files_of_the_tree() {
    super::hold(&broken_links(&super::tree()));
}
