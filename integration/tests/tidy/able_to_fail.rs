//! Every rule is able to fail: what it finds, and what it lets be, on literals.

use super::*;

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
fn unsafe_code_in_another_place_is_found() {
    let rule = unsafe_code_elsewhere;
    let block = "//! No unsafe code here.\nfn f() { unsafe { g() } }\n";
    let allowed = "//! x\n#[allow(unsafe_code, reason = \"so\")]\nmod m;\nfn unsafely() {}\n";
    check(rule, &[File::new("runtime/src/raw.rs", block)], &[]);
    check(rule, &[File::new("a.rs", block), File::new("b.rs", allowed)], &["a.rs:2: ", "b.rs:2: "]);
}

#[test]
fn a_tuple_that_binds_several_values_is_found() {
    let rule = bindings_on_one_line;
    let bound = |line: &str| [File::new("a.rs", format!("fn f() {{\n    {line}\n}}\n"))];
    check(rule, &bound("let (a, mut b) = (1, 2);"), &["a.rs:2: "]);
    check(rule, &bound("let (a, b) = (f(), vec!["), &["a.rs:2: "]);
    check(rule, &bound("let (a, b) = f(1, 2);"), &[]);
    check(rule, &bound("let (Some(a), None) = (f(), g()) else {"), &[]);
    check(rule, &bound("if let (Some(a), Ok(b)) = (f(), g()) {"), &[]);
}

#[test]
fn a_file_of_the_map_that_does_not_exist_is_found() {
    let check = |map: &str, violations: &[&str]| {
        let map = File::new("ARCHITECTURE.md", map);
        let tree = ["a/src/one.rs", "a/src/below/two.rs"].map(|path| File::new(path, ""));
        check(links::unknown_files_of_the_map, &[&tree[..], &[map]].concat(), violations);
    };
    check("`a/src/one.rs`, `below/two.rs`, then `a/src/below/`: `two.rs`\n", &[]);
    check("1. `a/src/one.rs`\n2. `one.rs`\n", &["`one.rs`"]);
    check("| `a/src/below/two.rs` | `one.rs` |\n", &["`one.rs`"]);
    check("`a/src/three.rs`\n", &["`a/src/three.rs`"]);
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

#[test]
fn archaic_words_are_found_in_comments_strings_and_markdown() {
    let plain = |count| "plain words ".repeat(count);
    let rule = words::archaic_words;
    check(
        rule,
        &[File::new("a.rs", format!("/// {}{}\n", plain(10), concat!("no", "body")))],
        &["a.rs:1"],
    );
    let lines = format!("\n\nlet a = \"{} {}\";", plain(10), concat!("is ov", "er"));
    check(rule, &[File::new("a.rs", lines)], &["a.rs:3"]);
    let text = format!("# Title\n\n{}", concat!("what it te", "lls"));
    check(rule, &[File::new("a.md", text)], &["a.md:3"]);
    let code = format!("let {} = 1;", concat!("no", "body"));
    check(rule, &[File::new("a.rs", code)], &[]);
    let rare = format!("{}{}", plain(2_000), concat!("no", "body"));
    check(rule, &[File::new("a.md", rare)], &[]);
}

#[test]
fn test_names_that_begin_with_a_pronoun_are_found() {
    let check = |text: &str, violations: &[&str]| {
        check(words::vague_test_names, &[File::new("a.rs", text)], violations);
    };
    check("#[test]\nfn it_works() {}", &["a.rs: it_works"]);
    check("#[tokio::test(start_paused = true)]\nasync fn who_is_refused() {}", &["who_is_refused"]);
    check("#[test]\nfn items_are_sorted() {}\nfn it_is_a_helper() {}", &[]);
}

#[test]
fn type_names_that_exist_twice_are_found() {
    let check = |first: &str, second: &str, violations: &[&str]| {
        let files = [File::new("a/src/a.rs", first), File::new("b/src/b.rs", second)];
        check(types::repeated_type_names, &files, violations);
    };
    check(
        "pub struct Plan;",
        "pub(crate) enum Plan {}",
        &["Plan is defined 2 times: a/src/a.rs:1, b"],
    );
    check("struct Plan<'a>(&'a str);", "type Plan = u8;", &["Plan is defined"]);
    check("struct Plan;", "struct Planner;", &[]);
    check("struct Plan;", "#[cfg(test)]\nmod tests {\n    struct Plan;\n}", &[]);
    check("struct Plan;", "impl Trait for A {\n    type Plan = u8;\n}", &[]);
}

#[test]
fn links_that_lead_nowhere_are_found() {
    let check = |text: &str, violations: &[&str]| {
        let files = [File::new("docs/a.md", text), File::new("src/b.rs", "//! B.")];
        check(links::broken_links, &files, violations);
    };
    check(
        "[b](../src/b.rs), [folder](../src), [part](../src/b.rs#L1), [web](https://a.example/)",
        &[],
    );
    check("[b](src/b.rs)", &["docs/a.md: the link to src/b.rs leads nowhere"]);
    check("[c](../src/c.rs)", &["c.rs leads nowhere"]);
}

/// Expects import cycles in a crate of these files, each given by a part of its description.
fn check_cycles(files: &[(&str, &str)], cycles: &[&str]) {
    let file = |(path, text): &(&str, &str)| File::new(format!("a/src/{path}"), *text);
    let files: Vec<File> = files.iter().map(file).collect();
    check(import_cycles::import_cycles, &files, cycles);
}

#[test]
fn modules_that_import_each_other_are_found() {
    let root = ("lib.rs", "mod a;\nmod b;\nmod c;");
    let c = ("c.rs", "pub struct C;");
    let a = ("a.rs", "use crate::{b::{self, B as Other}, c::C};");
    let cycle = "a/src: 2 modules depend on each other; break the cycle by moving an item:\n    \
                 a imports from b: B\n    b imports from a: A";
    check_cycles(&[root, a, c, ("b.rs", "use super::a::A;\npub struct B;")], &[cycle]);
    check_cycles(&[root, a, c, ("b.rs", "fn f() -> u8 { crate::a::A::new(1) }")], &[cycle]);
    check_cycles(&[root, a, c, ("b.rs", "fn f() { say!(\"{}\", [crate::a::A]); }")], &[cycle]);
    check_cycles(&[root, a, c, ("b.rs", "use super::a;\nfn f(a: &a::A) {}")], &[cycle]);
    check_cycles(&[root, a, c, ("b.rs", "#[arg(parser = crate::a::A)]\nstruct S;")], &[cycle]);
    check_cycles(&[root, a, c, ("b.rs", "use super::a::*;")], &["b imports from a: *"]);
    check_cycles(&[root, a, c, ("b.rs", "use crate::c::C;\nuse other::a::A;")], &[]);
    check_cycles(&[root, a, c, ("b.rs", "pub(in crate::a) struct B;\nuse super::a;")], &[]);
}

#[test]
fn cycles_through_a_third_module_are_found() {
    let root = ("lib.rs", "mod a;\nmod b;\nmod c;");
    let a = ("a.rs", "use crate::b::B;");
    let b = ("b.rs", "mod inner { use crate::c::C; }");
    let found = "3 modules depend on each other; break the cycle by moving an item:\n    \
                 a imports from b: B\n    b imports from c: C\n    c imports from a: A";
    check_cycles(&[root, a, b, ("c.rs", "use crate::a::A;")], &[found]);
    check_cycles(&[root, a, b, ("c.rs", "use std::fmt::A;")], &[]);
}

#[test]
fn a_module_and_one_child_may_import_each_other() {
    let root = ("lib.rs", "mod a;");
    let parent = ("a/mod.rs", "mod b;\nmod c;\nfn f() { b::f(); c::f(); }");
    let b = ("a/b.rs", "use super::Parent;");
    check_cycles(&[root, parent, b, ("a/c.rs", "fn f() {}")], &[]);
    check_cycles(&[root, parent, b, ("a/c.rs", "use super::Parent;")], &["3 modules depend"]);
    check_cycles(
        &[root, parent, b, ("a/c.rs", "use super::b::B;\nuse super::Parent;")],
        &["a::c imports from a: Parent\n    a::c imports from a::b: B"],
    );
}

#[test]
fn an_imported_item_is_of_the_module_that_defines_it() {
    let root = ("lib.rs", "mod a;\nmod d;\nfn f() {}");
    let c = ("a/c.rs", "pub struct C;");
    for reexport in ["pub(crate) use c::C;", "pub(crate) use self::c::*;", "use c::E as C;"] {
        let parent = format!("mod b;\nmod c;\n{reexport}\nuse crate::d::D;");
        let parent = ("a/mod.rs", parent.as_str());
        let d = ("d.rs", "use crate::a::C;");
        check_cycles(&[root, parent, c, ("a/b.rs", ""), d], &[]);
        let user = ("a/b.rs", "use super::C;\nuse crate::d::D;");
        check_cycles(&[root, parent, c, user, ("d.rs", "")], &[]);
        let back = ("a/c.rs", "pub struct C;\nuse crate::d::D;");
        check_cycles(&[root, parent, back, ("a/b.rs", ""), d], &["a::c imports from d: D"]);
    }
}

#[test]
fn imports_of_tests_and_names_in_texts_make_no_cycle() {
    let root = ("lib.rs", "mod a;\nmod b;\n#[cfg(test)]\nmod c;");
    let a = ("a.rs", "use crate::b::B;");
    for test in [
        "#[cfg(test)]\nmod tests { use crate::a::A; }",
        "#[cfg(any(test, fuzzing))]\nuse crate::a::A;",
        "impl B {\n    #[cfg(test)]\n    fn f() { crate::a::A; }\n}",
        "// crate::a::A\n/// crate::a::A\nconst B: &str = \"crate::a::A\";",
    ] {
        check_cycles(&[root, a, ("b.rs", test), ("c.rs", "use crate::{a, b};")], &[]);
    }
    check_cycles(&[root, a, ("b.rs", "#[cfg(not(test))]\nuse crate::a::A;")], &["2 modules"]);
}
