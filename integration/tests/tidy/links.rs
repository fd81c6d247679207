//! Links of Markdown files and the file names of ARCHITECTURE.md lead to files of the tree.

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

/// Files and folders that ARCHITECTURE.md names and that do not exist. A name without a folder is in the folder of
/// the path before it in the same step, row or paragraph.
pub(crate) fn unknown_files_of_the_map(files: &[File]) -> Vec<String> {
    let name = Regex::new(r"`([A-Za-z0-9_./-]+(?:\.rs|/))`").expect("the expression is valid");
    let unit = Regex::new(r"\n(?:\d+\. |\| |\n|- )").expect("the expression is valid");
    let maps = files.iter().filter(|file| file.path == "ARCHITECTURE.md");
    let mut unknown = Vec::new();
    for text in maps.flat_map(|map| unit.split(&map.text)) {
        let mut folder = String::new();
        for named in name.captures_iter(text).filter_map(|found| found.get(1)) {
            let named = named.as_str();
            let path = named.trim_end_matches('/');
            let beside = format!("{folder}/{path}");
            if named.contains('/') && exists(path, files) {
                let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                folder = if named.ends_with('/') { path } else { parent }.to_owned();
            } else if folder.is_empty() || !exists(&beside, files) {
                unknown.push(format!(
                    "ARCHITECTURE.md: `{named}`: not in the tree, nor in {folder:?}: write the whole path"
                ));
            }
        }
    }
    unknown
}

#[test]
fn files_of_the_map_exist() {
    super::hold(&unknown_files_of_the_map(&super::tree()));
}

#[test]
fn links_lead_to_files_of_the_tree() {
    super::hold(&broken_links(&super::tree()));
}
