//! The house rules, checked by tests rather than by reviewers.
//!
//! Each rule is a plain function from the files of the tree ([`tree`]) to its violations, so that
//! [`able_to_fail`] can show, on literals, that the rule is able to fail. A violation names the file and
//! what to do about it. To change a rule, change its function here and say why in the commit.

mod able_to_fail;
mod import_cycles;
mod links;
mod tree;
mod types;
mod words;

use tree::{File, code, is_word, tree};

// ------------------------------------------------------------------ (a) crates depend downward

/// The drawing of the workspace, lowest first. A crate may use what stands on a lower line, and
/// never a neighbour on its own.
const DRAWING: &[&[&str]] = &[
    &["weft-model"],
    &["weft-certs", "weft-xds", "weft-runtime"],
    &["weft-agent", "weft-sidecar", "weft-control"],
    &["weft"],
    &["weft-integration"],
];

/// Outside the drawing: it uses the mesh as an operator does, through files, and links no crate of it.
const USER: &str = "weft-examples";

fn floor(package: &str) -> Option<usize> {
    DRAWING.iter().position(|row| row.contains(&package))
}

/// What a manifest says that the drawing is about.
struct Manifest<'a> {
    package: Option<&'a str>,
    /// Keys of `[dependencies]`, `[dev-dependencies]` and `[build-dependencies]`, for any target.
    dependencies: Vec<&'a str>,
}

impl<'a> Manifest<'a> {
    fn read(text: &'a str) -> Self {
        let mut manifest = Self { package: None, dependencies: Vec::new() };
        let mut section = "";
        for line in text.lines().map(str::trim) {
            if let Some(header) = line.strip_prefix('[') {
                section = header.split(']').next().unwrap_or(header);
                manifest.dependencies.extend(dependency_with_own_table(section));
            } else if let Some((key, value)) = line.split_once('=') {
                let key = key.trim();
                if section == "package" && key == "name" {
                    manifest.package = Some(value.trim().trim_matches('"'));
                } else if lists_dependencies(section) {
                    let name = key.split('.').next().unwrap_or(key);
                    manifest.dependencies.push(name.trim().trim_matches('"'));
                }
            }
        }
        manifest
    }
}

/// `dependencies` or `target.'cfg(unix)'.dev-dependencies`; not the shared versions of the workspace.
fn lists_dependencies(section: &str) -> bool {
    let table = section.rsplit('.').next().unwrap_or(section);
    matches!(table, "dependencies" | "dev-dependencies" | "build-dependencies")
        && !section.starts_with("workspace.")
}

/// The `name` of a section `[dependencies.name]`.
fn dependency_with_own_table(section: &str) -> Option<&str> {
    let (table, name) = section.rsplit_once('.')?;
    lists_dependencies(table).then_some(name)
}

fn dependencies_that_point_up(files: &[File]) -> Vec<String> {
    files.iter().filter(|file| file.is_manifest()).flat_map(dependencies_against_drawing).collect()
}

fn dependencies_against_drawing(file: &File) -> Vec<String> {
    let path = &file.path;
    let manifest = Manifest::read(&file.text);
    let mut found: Vec<String> = file
        .numbered()
        .filter(|(_, line)| code_of_toml(line).contains("package = \"weft"))
        .map(|(number, _)| format!("{path}:{number}: renames a crate of ours; use its own name"))
        .collect();
    let Some(package) = manifest.package else { return found };
    let own = floor(package);
    if own.is_none() && package != USER {
        found.push(format!("{path}: {package} is not in the drawing; give it a place in DRAWING"));
    }
    for dependency in manifest.dependencies {
        let ours = floor(dependency).is_some() || dependency == USER;
        let below = floor(dependency).is_some_and(|there| own.is_some_and(|here| there < here));
        if ours && !below {
            found.push(format!(
                "{path}: {package} may not depend on {dependency}; crates depend downward only"
            ));
        }
    }
    found
}

fn code_of_toml(line: &str) -> &str {
    line.split('#').next().unwrap_or(line)
}

#[test]
fn crates_depend_downward_only() {
    hold(&dependencies_that_point_up(&tree()));
}

#[test]
fn every_crate_of_the_drawing_exists() {
    let tree = tree();
    let manifests = tree.iter().filter(|file| file.is_manifest());
    let packages: Vec<&str> =
        manifests.filter_map(|file| Manifest::read(&file.text).package).collect();
    for expected in DRAWING.iter().copied().flatten().chain([&USER]) {
        assert!(packages.contains(expected), "no Cargo.toml is of {expected}, which DRAWING names");
    }
}

// ------------------------------------------------------------------ (b) lints

fn crates_without_the_lints(files: &[File]) -> Vec<String> {
    let inherits = |text: &str| {
        let mut section = "";
        text.lines().map(|line| code_of_toml(line).trim()).any(|line| {
            if line.starts_with('[') {
                section = line;
            }
            let setting: String = line.split_whitespace().collect();
            (section == "[lints]" && setting == "workspace=true")
                || (section.is_empty() && setting == "lints.workspace=true")
        })
    };
    files
        .iter()
        .filter(|file| file.is_manifest() && Manifest::read(&file.text).package.is_some())
        .filter(|file| !inherits(&file.text))
        .map(|file| format!("{}: lacks `[lints]` with `workspace = true`", file.path))
        .collect()
}

#[test]
fn every_crate_inherits_the_workspace_lints() {
    hold(&crates_without_the_lints(&tree()));
}

// ------------------------------------------------------------------ (c) files

const CODE_LINES_LIMIT: usize = 500;
const TEST_LINES_LIMIT: usize = 1000;
const MAIN: &str = "src/main.rs";
const MAIN_LINES_LIMIT: usize = 60;

fn files_without_a_head(files: &[File]) -> Vec<String> {
    files
        .iter()
        .filter(|file| file.is_rust() && !file.text.starts_with("//!"))
        .map(|file| format!("{}: does not start with `//!`: say what the file is for", file.path))
        .collect()
}

fn files_too_long(files: &[File]) -> Vec<String> {
    files.iter().filter(|file| file.is_rust()).filter_map(length_violation).collect()
}

fn length_violation(file: &File) -> Option<String> {
    let path = &file.path;
    let (lines, limit, advice) = if path == MAIN {
        (file.text.lines().count(), MAIN_LINES_LIMIT, "it only dispatches; move the work out")
    } else if file.is_wholly_tests() {
        (file.text.lines().count(), TEST_LINES_LIMIT, "divide the tests by what they promise")
    } else {
        let lines = file.lines_before_tests();
        (lines, CODE_LINES_LIMIT, "find the second idea in the file and give it its own")
    };
    (lines > limit).then(|| format!("{path}: {lines} lines, the limit is {limit}: {advice}"))
}

#[test]
fn every_file_says_what_it_is_for() {
    hold(&files_without_a_head(&tree()));
}

#[test]
fn every_file_fits_in_a_sitting() {
    hold(&files_too_long(&tree()));
}

// ------------------------------------------------------------------ (d) proofs

/// Where a proof of identity may be asserted: once, in the acceptor that has finished the handshake.
fn peers_asserted_twice(files: &[File]) -> Vec<String> {
    let callers: Vec<String> = files
        .iter()
        .filter(|file| file.is_rust() && !file.is_wholly_tests())
        .filter(|file| !file.path.starts_with("integration/"))
        .flat_map(|file| {
            let calls =
                file.production_code().filter(|(_, c)| c.contains("VerifiedPeer::assertion("));
            calls.map(|(number, _)| format!("{}:{number}", file.path)).collect::<Vec<_>>()
        })
        .collect();
    if callers.len() <= 1 {
        return Vec::new();
    }
    let complain = |caller| {
        format!(
            "{caller}: `VerifiedPeer::assertion` may have one caller outside tests, not several"
        )
    };
    callers.into_iter().map(complain).collect()
}

#[test]
fn peers_are_asserted_in_one_place() {
    hold(&peers_asserted_twice(&tree()));
}

/// The one file that may hold unsafe code.
const UNSAFE: &str = "runtime/src/raw.rs";

fn unsafe_code_elsewhere(files: &[File]) -> Vec<String> {
    let others = files.iter().filter(|file| file.is_rust() && file.path != UNSAFE);
    let others: Vec<File> = others.cloned().collect();
    violations_by_line(&others, |line| {
        let found = ["unsafe", "unsafe_code"].iter().any(|word| holds_word(&code(line), word));
        found.then(|| format!("unsafe code: a library's call, or a reason to be in {UNSAFE}"))
    })
}

#[test]
fn unsafe_code_is_in_one_place() {
    hold(&unsafe_code_elsewhere(&tree()));
}

// ------------------------------------------------------------------ (e) nothing left behind

/// Written in halves, so that this file holds none of them.
const LEFT_BEHIND: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("to", "do!")];

fn work_left_behind(files: &[File]) -> Vec<String> {
    violations_by_line(files, |line| {
        let marker = LEFT_BEHIND.iter().find(|marker| holds_word(line, marker))?;
        Some(format!("`{marker}`: finish it, or open an issue that holds it"))
    })
}

/// Whether `word` stands in `line` with no identifier running into it from either side.
fn holds_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = &line.get(..at);
        let after = &line.get(at + word.len()..);
        !before.is_some_and(|text| text.ends_with(is_word))
            && (word.ends_with('!') || !after.is_some_and(|text| text.starts_with(is_word)))
    })
}

fn tests_ignored_without_a_reason(files: &[File]) -> Vec<String> {
    let rust: Vec<File> = files.iter().filter(|file| file.is_rust()).cloned().collect();
    violations_by_line(&rust, |line| {
        let attribute: String = line.split_whitespace().collect();
        let bare = attribute.starts_with("#[ignore]")
            || attribute.starts_with("#[ignore=\"\"")
            || attribute.starts_with("#[cfg_attr(") && attribute.contains(",ignore)");
        bare.then(|| "an ignored test says why: `#[ignore = \"reason\"]`".to_owned())
    })
}

#[test]
fn no_unfinished_work_is_left_in_the_tree() {
    hold(&work_left_behind(&tree()));
}

#[test]
fn an_ignored_test_says_why() {
    hold(&tests_ignored_without_a_reason(&tree()));
}

/// Several values bound at once by a tuple, as in `let (a, b) = (1, 2);`.
fn bindings_on_one_line(files: &[File]) -> Vec<String> {
    let rust: Vec<File> = files.iter().filter(|file| file.is_rust()).cloned().collect();
    violations_by_line(&rust, |line| {
        let code = code(line);
        let (names, values) = code.trim().strip_prefix("let (")?.split_once(") = ")?;
        // A pattern that may not match, as in `let (Some(a), None) = (..) else`, has no other form.
        let is_plain = names.chars().all(|c| is_word(c) && !c.is_uppercase() || ", ".contains(c));
        (is_plain && values.starts_with('('))
            .then(|| "binds several values by a tuple: one statement for each".to_owned())
    })
}

#[test]
fn each_value_is_bound_by_its_own_statement() {
    hold(&bindings_on_one_line(&tree()));
}

// ------------------------------------------------------------------ (f) no machine but yours

/// First folders of absolute paths that exist on one developer's machine and on nobody else's.
const MACHINE_FOLDERS: &[&str] = &["work", "farm", "root"];

fn paths_of_one_machine(files: &[File]) -> Vec<String> {
    violations_by_line(files, |line| {
        let folder = MACHINE_FOLDERS.iter().find(|folder| holds_absolute_path(line, folder))?;
        Some(format!("names a path below /{folder}, which is on one machine only"))
    })
}

/// Whether an absolute path that begins with `folder` is in `line`. `docs/root/page` is a relative one.
fn holds_absolute_path(line: &str, folder: &str) -> bool {
    let relative = |c: char| is_word(c) || ".-~})*".contains(c);
    line.match_indices(&format!("/{folder}/"))
        .any(|(at, _)| !line.get(..at).is_some_and(|before| before.ends_with(relative)))
}

#[test]
fn no_file_names_a_path_of_one_machine() {
    hold(&paths_of_one_machine(&tree()));
}

// ------------------------------------------------------------------ (g) protobuf stays at the edge

/// Where generated types may be named: the crate that turns them into the model.
const PROTOBUF_HOMES: &[&str] = &["xds/src/", "xds/tests/", "xds/build.rs"];
const PROTOBUF_CRATES: &[&str] = &["envoy_types", "prost", "prost_types", "prost_reflect"];

fn protobuf_outside_its_home(files: &[File]) -> Vec<String> {
    let outside: Vec<File> = files
        .iter()
        .filter(|file| file.is_rust())
        .filter(|file| !PROTOBUF_HOMES.iter().any(|home| file.path.starts_with(home)))
        .cloned()
        .collect();
    violations_by_line(&outside, |line| {
        let code = code(line);
        let imports = holds_word(&code, "use") || holds_word(&code, "extern");
        let name = PROTOBUF_CRATES.iter().find(|name| {
            holds_word(&code, name) && (imports || code.contains(&format!("{name}::")))
        })?;
        Some(format!("names `{name}`: protobuf ends in xds/src, take the model's type"))
    })
}

#[test]
fn protobuf_ends_in_the_xds_crate() {
    hold(&protobuf_outside_its_home(&tree()));
}

fn violations_by_line(files: &[File], rule: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let of_file = |file: &File| {
        let broken = file.numbered().filter_map(|(number, line)| Some((number, rule(line)?)));
        broken.map(|(number, why)| format!("{}:{number}: {why}", file.path)).collect::<Vec<_>>()
    };
    files.iter().flat_map(of_file).collect()
}

fn hold(violations: &[String]) {
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}
