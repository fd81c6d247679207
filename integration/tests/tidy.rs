//! The house rules, held by a test rather than by a reviewer's patience.
//!
//! Each rule is a plain function from the files of the tree to its violations, so that the second
//! half of this file can show, on literals, that the rule is able to fail. A violation names the file
//! and what to do about it. To change a rule, change its function here and say why in the commit.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// A file of the tree, its path relative to the root of the workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
struct File {
    path: String,
    text: String,
}

impl File {
    fn new(path: impl Into<String>, text: impl Into<String>) -> Self {
        Self { path: path.into(), text: text.into() }
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_manifest(&self) -> bool {
        self.path == "Cargo.toml" || self.path.ends_with("/Cargo.toml")
    }

    /// Whether nothing in the file is meant for production.
    fn is_wholly_tests(&self) -> bool {
        let path = Path::new(&self.path);
        path.iter().any(|part| part == "tests") || path.file_name().is_some_and(|n| n == "tests.rs")
    }

    /// How many lines come before the test module that ends the file, or all of them.
    ///
    /// Only a `#[cfg(test)]` on an inline module ends the count: one on an import or on `mod tests;`
    /// may stand at the top, and the code below it is as long as ever.
    fn lines_before_tests(&self) -> usize {
        let lines: Vec<&str> = self.text.lines().collect();
        let opens_tests = |at: usize| {
            let mut after = lines.iter().skip(at + 1);
            after
                .find(|line| line.starts_with(|c: char| c.is_alphabetic()))
                .is_some_and(|line| line.contains("mod ") && line.ends_with('{'))
        };
        lines
            .iter()
            .enumerate()
            .position(|(at, line)| line.starts_with("#[cfg(test)]") && opens_tests(at))
            .unwrap_or(lines.len())
    }

    /// The numbered lines of code before the tests, without comments and the insides of strings.
    fn production_code(&self) -> impl Iterator<Item = (usize, String)> {
        self.numbered().take(self.lines_before_tests()).map(|(number, line)| (number, code(line)))
    }

    fn numbered(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(at, line)| (at + 1, line))
    }
}

/// A line without its comment and without what stands inside its strings. It sees one line at a time,
/// so a string over several lines is taken for code: a false alarm, never a miss.
fn code(line: &str) -> String {
    let mut kept = String::with_capacity(line.len());
    let mut in_string = false;
    let line = line.replace("'\"'", "' '").replace("\\\\", "  ").replace("\\\"", "  ");
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' => in_string = !in_string,
            _ if in_string => {}
            '/' if chars.peek() == Some(&'/') => break,
            other => kept.push(other),
        }
    }
    kept
}

/// Whether `c` can be part of an identifier.
fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

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
        let (before, after) = (&line.get(..at), &line.get(at + word.len()..));
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

// ------------------------------------------------------------------ reading the tree

fn violations_by_line(files: &[File], rule: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let of_file = |file: &File| {
        let broken = file.numbered().filter_map(|(number, line)| Some((number, rule(line)?)));
        broken.map(|(number, why)| format!("{}:{number}: {why}", file.path)).collect::<Vec<_>>()
    };
    files.iter().flat_map(of_file).collect()
}

/// Every file of the workspace: those under git, and those that the next `git add` would bring.
fn tree() -> Vec<File> {
    let root = root();
    let listed = Command::new("git")
        // The tests may run as root of a user namespace, where the tree belongs to somebody else.
        .args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"])
        .arg("--exclude-standard")
        .current_dir(&root)
        .output()
        .expect("git is installed, the tree came by it");
    assert!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let listed = String::from_utf8(listed.stdout).expect("paths of the tree are UTF-8");
    let files: Vec<File> = listed
        .split_terminator('\0')
        .filter_map(|path| {
            // A file that git lists and the disk lacks was just deleted or moved.
            let bytes = fs::read(root.join(path)).ok()?;
            Some(File::new(path, String::from_utf8_lossy(&bytes)))
        })
        .collect();
    assert!(files.iter().any(|file| file.path == "Cargo.toml"), "{} has no tree", root.display());
    files
}

fn root() -> PathBuf {
    let here = env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where the crate is");
    PathBuf::from(here).join("..")
}

fn hold(violations: &[String]) {
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}

// ------------------------------------------------------------------ every rule is able to fail

/// Expects `rule` to find on `files` just `violations`, each given by a part of its text.
fn check(rule: impl Fn(&[File]) -> Vec<String>, files: &[File], violations: &[&str]) {
    let found = rule(files);
    assert_eq!(found.len(), violations.len(), "expected {violations:?}, found {found:#?}");
    for (found, expected) in found.iter().zip(violations) {
        assert!(found.contains(expected), "expected {expected:?} in {found:?}");
    }
}

fn manifest(package: &str, rest: &str) -> File {
    File::new("a/Cargo.toml", format!("[package]\nname = \"{package}\"\n\n{rest}\n"))
}

fn repeated(head: &str, line: &str, count: usize) -> String {
    format!("{head}\n{}", format!("{line}\n").repeat(count))
}

#[test]
fn a_dependency_on_a_lower_crate_is_allowed() {
    let rule = dependencies_that_point_up;
    check(rule, &[manifest("weft-xds", "[dependencies]\nweft-model.workspace = true")], &[]);
    check(rule, &[manifest("weft", "[dependencies]\nweft-agent = { path = \"agent\" }")], &[]);
    check(rule, &[manifest("weft-integration", "[dev-dependencies]\nweft.workspace = true")], &[]);
    check(rule, &[manifest("weft-agent", "[dependencies]\ntokio.workspace = true")], &[]);
}

#[test]
fn a_dependency_on_a_neighbour_or_a_higher_crate_is_found() {
    let check = |package, dependencies: &str, violation| {
        check(dependencies_that_point_up, &[manifest(package, dependencies)], &[violation]);
    };
    let agent = "[dependencies]\nweft-agent.workspace = true";
    check("weft-sidecar", agent, "a/Cargo.toml: weft-sidecar may not depend on weft-agent");
    check("weft-agent", "[dependencies]\nweft-sidecar = { path = \"..\" }", "on weft-sidecar");
    check("weft-control", agent, "weft-control may not depend on weft-agent");
    check("weft-xds", "[dependencies]\nweft-certs.workspace = true", "on weft-certs");
    check("weft-runtime", "[dependencies]\nweft-xds.workspace=true", "on weft-xds");
    check("weft-certs", "[dependencies]\n\"weft-runtime\" = \"0.1\"", "on weft-runtime");
    check("weft-model", "[dependencies]\nweft-runtime.workspace = true", "on weft-runtime");
    check("weft", "[dependencies]\nweft-integration.workspace = true", "on weft-integration");
    check("weft-examples", "[dependencies]\nweft-model.workspace = true", "on weft-model");
    check("weft", "[dependencies]\nweft-examples.workspace = true", "on weft-examples");
}

#[test]
fn no_table_of_a_manifest_hides_a_dependency() {
    let check = |dependencies: &str, violation| {
        check(dependencies_that_point_up, &[manifest("weft-xds", dependencies)], &[violation]);
    };
    check("[dev-dependencies]\nweft-control.workspace = true", "on weft-control");
    check("[build-dependencies]\nweft-certs.workspace = true", "on weft-certs");
    check("[target.'cfg(unix)'.dependencies]\nweft-agent.workspace = true", "on weft-agent");
    check("[dependencies.weft-agent]\nworkspace = true", "on weft-agent");
    check("[dependencies]\nfriend = { package = \"weft-agent\" }", "a/Cargo.toml:5: renames");
}

#[test]
fn shared_versions_of_the_workspace_are_no_dependencies() {
    let root = "[workspace.dependencies]\nweft-integration = { path = \"integration\" }";
    check(dependencies_that_point_up, &[manifest("weft-model", root)], &[]);
}

#[test]
fn a_crate_outside_the_drawing_is_found() {
    check(
        dependencies_that_point_up,
        &[manifest("weft-common", "[dependencies]\nweft-model.workspace = true")],
        &["weft-common is not in the drawing", "weft-common may not depend on weft-model"],
    );
}

#[test]
fn a_crate_without_the_lints_is_found() {
    let rule = crates_without_the_lints;
    check(rule, &[manifest("weft", "[lints]\nworkspace = true")], &[]);
    check(rule, &[manifest("weft", "[lints]\n# why\nworkspace=true # yes")], &[]);
    check(rule, &[File::new("Cargo.toml", "[workspace]\nresolver = \"3\"")], &[]);
    check(rule, &[manifest("weft", "[dependencies]")], &["a/Cargo.toml: lacks `[lints]`"]);
    check(rule, &[manifest("weft", "[lints]\nworkspace = false")], &["lacks `[lints]`"]);
    check(rule, &[manifest("weft", "[lints]\n[x]\nworkspace = true")], &["lacks `[lints]`"]);
}

#[test]
fn a_file_without_a_head_is_found() {
    let rule = files_without_a_head;
    check(rule, &[File::new("a.rs", "//! What it is for.\n")], &[]);
    check(rule, &[File::new("a.toml", "x = 1\n")], &[]);
    check(rule, &[File::new("a.rs", "\n//! Late.\n")], &["a.rs: does not start with `//!`"]);
    check(rule, &[File::new("a.rs", "// No head.\n")], &["a.rs: does not start"]);
    check(rule, &[File::new("a.rs", "")], &["a.rs: does not start"]);
}

#[test]
fn a_file_of_500_lines_is_allowed_and_of_501_is_not() {
    let rule = files_too_long;
    check(rule, &[File::new("a/src/b.rs", repeated("//! x", "fn f() {}", 499))], &[]);
    let long = File::new("a/src/b.rs", repeated("//! x", "fn f() {}", 500));
    check(rule, &[long], &["a/src/b.rs: 501 lines, the limit is 500"]);
}

#[test]
fn lines_of_a_test_module_do_not_count() {
    let rule = files_too_long;
    let tests = repeated("#[cfg(test)]\nmod tests {", "    // x", 900) + "}\n";
    let short = repeated("//! x", "fn f() {}", 499) + &tests;
    check(rule, &[File::new("a/src/b.rs", short)], &[]);
    let explained = tests.replace("\nmod", "\n#[expect(unused, reason = \"shown\")]\nmod");
    check(rule, &[File::new("a/src/b.rs", format!("//! x\n{explained}"))], &[]);
    let long = repeated("//! x", "fn f() {}", 500) + &tests;
    check(rule, &[File::new("a/src/b.rs", long)], &["501 lines, the limit is 500"]);
}

#[test]
fn a_test_attribute_at_the_top_does_not_hide_the_code_below() {
    for attributed in ["use std::fs;", "mod tests;"] {
        let text = repeated(&format!("//! x\n#[cfg(test)]\n{attributed}"), "fn f() {}", 500);
        check(files_too_long, &[File::new("a/src/b.rs", text)], &["503 lines"]);
    }
}

#[test]
fn a_file_wholly_of_tests_may_have_1000_lines() {
    for path in ["a/tests/b.rs", "integration/tests/b/c.rs", "a/src/b/tests.rs"] {
        let rule = files_too_long;
        check(rule, &[File::new(path, repeated("//! x", "fn f() {}", 999))], &[]);
        let long = File::new(path, repeated("//! x", "fn f() {}", 1000));
        check(rule, &[long], &["1001 lines, the limit is 1000"]);
    }
}

#[test]
fn main_only_dispatches() {
    let rule = files_too_long;
    check(rule, &[File::new("src/main.rs", repeated("//! x", "// y", 59))], &[]);
    let long = File::new("src/main.rs", repeated("//! x", "// y", 60));
    check(rule, &[long], &["src/main.rs: 61 lines, the limit is 60"]);
}

#[test]
fn a_second_caller_of_the_assertion_is_found() {
    let rule = peers_asserted_twice;
    let caller = |path| File::new(path, "//! x\nlet peer = VerifiedPeer::assertion(identity);\n");
    let mentioned = File::new("c.rs", "//! `VerifiedPeer::assertion(` has one caller.\n");
    let tested = "//! x\n#[cfg(test)]\nmod tests {\n    VerifiedPeer::assertion(anyone());\n}\n";
    let tested = File::new("d.rs", tested);
    let one = [
        caller("sidecar/src/tls/acceptor.rs"),
        mentioned,
        tested,
        caller("sidecar/tests/path.rs"),
        caller("sidecar/src/tests.rs"),
        caller("integration/src/peer.rs"),
    ];
    check(rule, &one, &[]);
    let two = [one.as_slice(), &[caller("sidecar/src/http/debug.rs")]].concat();
    check(rule, &two, &["sidecar/src/tls/acceptor.rs:2: ", "sidecar/src/http/debug.rs:2: "]);
    let twice = File::new("e.rs", "VerifiedPeer::assertion(a);\nVerifiedPeer::assertion(b);\n");
    check(rule, &[twice], &["e.rs:1: ", "e.rs:2: "]);
}

#[test]
fn a_marker_of_unfinished_work_is_found() {
    let rule = work_left_behind;
    for marker in LEFT_BEHIND {
        let text = format!("fine\n// {marker}: later\n");
        check(rule, &[File::new("a.rs", text.clone())], &[&format!("a.rs:2: `{marker}`")]);
        check(rule, &[File::new("docs/a.md", text)], &["docs/a.md:2: "]);
        check(rule, &[File::new("a.rs", format!("A{marker}"))], &[]);
    }
    let call = format!("    {}()", LEFT_BEHIND[2]);
    check(rule, &[File::new("a.rs", call)], &["a.rs:1: "]);
    check(rule, &[File::new("Cargo.toml", "todo = \"warn\"")], &[]);
}

#[test]
fn an_ignored_test_without_a_reason_is_found() {
    let rule = tests_ignored_without_a_reason;
    check(rule, &[File::new("a.rs", "#[ignore = \"needs a kernel of 6.8\"]\n")], &[]);
    check(rule, &[File::new("a.md", "#[ignore]\n")], &[]);
    check(rule, &[File::new("a.rs", "#[test]\n    #[ignore]\n")], &["a.rs:2: an ignored test"]);
    check(rule, &[File::new("a.rs", "#[ignore = \"\"]\n")], &["a.rs:1: "]);
    check(rule, &[File::new("a.rs", "#[cfg_attr(miri, ignore)]\n")], &["a.rs:1: "]);
}

#[test]
fn a_path_of_one_machine_is_found() {
    let rule = paths_of_one_machine;
    for folder in MACHINE_FOLDERS {
        let path = format!("/{folder}/weft");
        let expected = format!("a.md:1: names a path below /{folder}");
        for text in
            [path.clone(), format!("see {path}"), format!("`{path}`"), format!("file://{path}")]
        {
            check(rule, &[File::new("a.md", text)], &[&expected]);
        }
        for text in [format!("docs{path}"), format!("$HOME{path}"), format!("..{path}")] {
            check(rule, &[File::new("a.md", text)], &[]);
        }
    }
}

#[test]
fn protobuf_outside_the_xds_crate_is_found() {
    let rule = protobuf_outside_its_home;
    for name in PROTOBUF_CRATES {
        let found = format!("agent/src/a.rs:1: names `{name}`");
        for text in [format!("use {name}::Message;"), format!("use {name} as wire;")] {
            check(rule, &[File::new("agent/src/a.rs", text.clone())], &[&found]);
            check(rule, &[File::new("xds/src/translate/a.rs", text.clone())], &[]);
            check(rule, &[File::new("xds/build.rs", text.clone())], &[]);
            check(
                rule,
                &[File::new("xds/model/src/a.rs", text.clone())],
                &["xds/model/src/a.rs:1"],
            );
            check(rule, &[File::new("agent/src/a.rs", format!("//! {text}"))], &[]);
        }
        let call = format!("let size = {name}::length(x);");
        check(rule, &[File::new("agent/src/a.rs", call)], &[&found]);
        check(rule, &[File::new("agent/src/a.rs", format!("log(\"{name}::x\");"))], &[]);
    }
    check(rule, &[File::new("a.rs", "use tonic_prost_like::x;")], &[]);
}

#[test]
fn code_is_what_comments_and_strings_leave() {
    for (line, expected) in [
        ("let a = 1; // b", "let a = 1; "),
        ("say(\"a // b\"); c", "say(); c"),
        ("say(\"a \\\" b\"); c", "say(); c"),
        ("say(\"a\\\\\"); c", "say(); c"),
        ("is('\"'); c", "is(' '); c"),
        ("//! head", ""),
    ] {
        assert_eq!(code(line), expected, "of {line}");
    }
}
