//! Reads the versions of `mesh.yaml`. If only items of one of its long lists have changed, only those are parsed again.

use std::ops::Range;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use weft_xds::located::ConfigError;
use weft_xds::located::{self, Located};

use super::check::{self, Diagnostic};
use super::referenced_files::ReferencedFiles;
use super::sections::{ListItems, ListName, ListSections};
use super::{Mesh, parse_errors, raw};

/// Up to this number of errors and warnings, lines are found by parsing single list items. Beyond it, the whole file is
/// parsed once.
const LOCATED_ALONE: usize = 64;

/// Reads the versions of one file.
#[derive(Debug, Default)]
pub(super) struct MeshReader {
    last: Option<ParsedFile>,
    last_warnings: LocatedWarnings,
}

/// The warnings of the last version, with and without their lines.
#[derive(Debug, Default)]
struct LocatedWarnings {
    warnings: Vec<Diagnostic>,
    located: Vec<ConfigError>,
}

impl MeshReader {
    /// Reads a version of the file. `files` reads the files that it refers to.
    ///
    /// # Errors
    /// Every error, with line and field.
    pub(super) fn read(
        &mut self,
        text: &Arc<str>,
        files: &ReferencedFiles,
    ) -> Result<Mesh, Vec<ConfigError>> {
        let parsed = self.last.take().and_then(|last| last.changed_to(text));
        let parsed = parsed.map_or_else(|| ParsedFile::new(text), Ok);
        let parsed = parsed.map_err(|first| parse_errors::all(text, files, first))?;
        let parsed = self.last.insert(parsed);
        let (mesh, warnings) =
            check::check(&parsed.raw, files).map_err(|errors| parsed.locate(&errors))?;
        if self.last_warnings.warnings != warnings {
            let located = parsed.locate(&warnings);
            self.last_warnings = LocatedWarnings { warnings, located };
        }
        Ok(Mesh { warnings: self.last_warnings.located.clone(), ..mesh })
    }

    /// The text as a shared string; the same allocation as the last version's if they are equal.
    pub(super) fn shared(&self, text: String) -> Arc<str> {
        let last = self.last.as_ref().filter(|last| *last.text == *text);
        last.map_or_else(|| text.into(), |last| last.text.clone())
    }
}

/// A version of the file.
#[derive(Debug)]
struct ParsedFile {
    text: Arc<str>,
    sections: ListSections,
    raw: raw::RawMesh,
}

impl ParsedFile {
    fn new(text: &Arc<str>) -> Result<Self, ConfigError> {
        let mut raw: raw::RawMesh = located::read(text)?;
        raw.shrink();
        Ok(Self { text: text.clone(), sections: ListSections::find(text), raw })
    }

    /// The version for another text, with only the changed items of one list parsed again. None if more has changed.
    ///
    /// This is correct because the text before the items is the same, so the parser reaches them in the same state. Each
    /// item can be parsed alone, so after it the parser expects the next item or the end of the list.
    fn changed_to(mut self, text: &Arc<str>) -> Option<Self> {
        if self.text == *text {
            return Some(self);
        }
        // An alias may refer to an anchor anywhere after it.
        if self.text.contains('&') || text.contains('&') {
            return None;
        }
        let sections = ListSections::find(text);
        let change = TextChange::between(&self.text, text);
        let changed = |list: ListName| {
            Some((list, change.items(self.sections.of(list)?, sections.of(list)?)?))
        };
        let (list, (old, new)) = ListName::ALL.into_iter().find_map(changed)?;
        let before = ListPiece::of(&self.text, self.sections.of(list)?, old)?;
        let after = ListPiece::of(text, sections.of(list)?, new)?;
        match list {
            ListName::Services => before.replace(&after, &mut self.raw.services)?,
            ListName::Routes => before.replace(&after, &mut self.raw.routes)?,
            ListName::Policies => before.replace(&after, &mut self.raw.security.policies)?,
        }
        self.text = text.clone();
        self.sections = sections;
        Some(self)
    }

    /// Adds lines to errors or warnings, and sorts them by line.
    fn locate(&self, diagnostics: &[Diagnostic]) -> Vec<ConfigError> {
        let alone = diagnostics.len() <= LOCATED_ALONE;
        let alone = |one: &Diagnostic| alone.then(|| self.line_alone(&one.path)).flatten();
        let lines: Vec<Option<u64>> = diagnostics.iter().map(alone).collect();
        let whole = if lines.contains(&None) { Located::parse(&self.text).ok() } else { None };
        let problem = |(one, line): (&Diagnostic, Option<u64>)| {
            let whole = || whole.as_ref().map_or(0, |located| located.line_of(&one.path));
            let text = format!("{}: {}", one.path, one.reason);
            ConfigError { line: line.unwrap_or_else(whole), text }
        };
        let mut problems: Vec<ConfigError> = diagnostics.iter().zip(lines).map(problem).collect();
        problems.sort_by_key(|problem| problem.line);
        problems
    }

    /// The line of a field of a list item, found by parsing the item alone. None for other fields, and for items that
    /// cannot be parsed alone.
    fn line_alone(&self, path: &str) -> Option<u64> {
        let in_list =
            |list: ListName| Some((list, path.strip_prefix(list.path())?.strip_prefix('[')?));
        let (list, rest) = ListName::ALL.into_iter().find_map(in_list)?;
        let (index, rest) = rest.split_once(']')?;
        let index = index.parse().ok()?;
        let items = self.sections.of(list)?;
        let count = match list {
            ListName::Services => self.raw.services.len(),
            ListName::Routes => self.raw.routes.len(),
            ListName::Policies => self.raw.security.policies.len(),
        };
        if items.starts.len() != count {
            return None;
        }
        let piece = ListPiece::of(&self.text, items, index..index + 1)?;
        let located = Located::parse(piece.text).ok()?;
        let before = items.lines.get(index)?;
        Some(before + located.line_of(&format!("[0]{rest}")))
    }
}

/// The range in which two texts differ.
#[derive(Debug)]
struct TextChange {
    /// The length of the common prefix, in bytes.
    prefix: usize,
    /// Where the common suffix begins in each text.
    old_end: usize,
    new_end: usize,
    /// The lengths of the texts, in bytes.
    old_len: usize,
    new_len: usize,
}

impl TextChange {
    fn between(old: &str, new: &str) -> Self {
        // Only whole lines: bytes that are equal by chance must not count for both ends.
        let prefix = same_at_start(old.as_bytes(), new.as_bytes());
        let lines = old.as_bytes().get(..prefix).unwrap_or_default();
        let prefix = lines.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let rest = |text: &'_ str| text.len() - prefix;
        let suffix = same_at_end(old.as_bytes(), new.as_bytes()).min(rest(old)).min(rest(new));
        Self {
            prefix,
            old_end: old.len() - suffix,
            new_end: new.len() - suffix,
            old_len: old.len(),
            new_len: new.len(),
        }
    }

    /// The items of a list that differ, before and after. None if something else differs.
    fn items(&self, old: &ListItems, new: &ListItems) -> Option<(Range<usize>, Range<usize>)> {
        let reached = old.starts.partition_point(|start| *start <= self.prefix);
        let first =
            (0..reached).rev().find(|index| old.starts.get(*index) == new.starts.get(*index))?;
        let is_same_list = old.indent == new.indent
            && old.end >= self.old_end
            && self.old_len - old.end == self.new_len - new.end;
        let behind = |items: &ListItems, end| {
            items.starts.iter().rev().take_while(|start| **start >= end).count()
        };
        let kept = behind(old, self.old_end).min(behind(new, self.new_end));
        let old = first..old.starts.len().checked_sub(kept)?;
        let new = first..new.starts.len().checked_sub(kept)?;
        (is_same_list && old.start <= old.end && new.start <= new.end).then_some((old, new))
    }
}

/// How many bytes are compared at a time.
const BLOCK_BYTES: usize = 1024;

/// The length of the common prefix of two texts.
fn same_at_start(one: &[u8], other: &[u8]) -> usize {
    let is_same = |(a, b): &(&[u8], &[u8])| a == b;
    let blocks = one.chunks(BLOCK_BYTES).zip(other.chunks(BLOCK_BYTES)).take_while(is_same);
    let same: usize = blocks.map(|(block, _)| block.len()).sum();
    let rest = one.iter().skip(same).zip(other.iter().skip(same));
    same + rest.take_while(|(a, b)| a == b).count()
}

/// The length of the common suffix of two texts.
fn same_at_end(one: &[u8], other: &[u8]) -> usize {
    let is_same = |(a, b): &(&[u8], &[u8])| a == b;
    let blocks = one.rchunks(BLOCK_BYTES).zip(other.rchunks(BLOCK_BYTES)).take_while(is_same);
    let same: usize = blocks.map(|(block, _)| block.len()).sum();
    let rest = one.iter().rev().skip(same).zip(other.iter().rev().skip(same));
    same + rest.take_while(|(a, b)| a == b).count()
}

/// Some items of a list, and their text.
#[derive(Debug)]
struct ListPiece<'t> {
    text: &'t str,
    items: Range<usize>,
    /// How many items the list has.
    all: usize,
}

impl<'t> ListPiece<'t> {
    fn of(text: &'t str, list: &ListItems, items: Range<usize>) -> Option<Self> {
        let text = text.get(list.span(items.clone())?)?;
        Some(Self { text, items, all: list.starts.len() })
    }

    /// The items, parsed alone. None if their number differs from the number of dashes.
    fn parse<T: DeserializeOwned>(&self) -> Option<Vec<T>> {
        if self.items.is_empty() {
            return Some(Vec::new());
        }
        located::read(self.text).ok().filter(|items: &Vec<T>| items.len() == self.items.len())
    }

    /// Replaces these items by those of `after`.
    fn replace<T: DeserializeOwned>(&self, after: &ListPiece<'_>, list: &mut Vec<T>) -> Option<()> {
        if list.len() != self.all || after.all == 0 {
            return None;
        }
        // If they cannot be parsed alone, the text after them may belong to them.
        self.parse::<T>()?;
        list.splice(self.items.clone(), after.parse()?);
        (list.len() == after.all).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const MESH: &str = r#"# A mesh.
trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- name: web
  addresses: [10.96.0.1]
  ports:
  - {port: 80, target: 8080, protocol: http}
  endpoints:
  - {address: 10.1.0.1}
  - address: 10.1.0.2

# Another.
- name: orders
  addresses: ["10.96.0.2"]
  ports: [{port: 80, target: 8080, protocol: http}, {port: 81, protocol: tcp}]
  endpoints: [{address: 10.1.0.3}]
  balance: least_requests
- name: last
  ports: [{port: 80, protocol: tcp}]
routes:
  - name: one
    parentRefs: [{name: web}]
    rules:
    - backendRefs: [{name: orders, port: 80}]
  - name: two
    parentRefs: [{name: orders, port: 80}]
    rules:
    - matches: [{path: {type: PathPrefix, value: "/old-path"}}]
      backendRefs: [{name: web, port: 80}]
security:
    issuers: {}
    policies:
    - service: web
      allow: [{from: ["*"]}]
    -
      service: orders
      allow:
      - {from: [web], methods: [GET]}
      - from: [web]
        ports: [81]
    revocations: [0a0b]
"#;

    fn version(text: &str) -> Arc<str> {
        text.into()
    }

    fn parsed(text: &str) -> ParsedFile {
        ParsedFile::new(&version(text)).expect("a valid file")
    }

    #[test]
    fn items_found_by_dashes_are_those_of_the_parser() {
        let ParsedFile { sections, raw, .. } = parsed(MESH);
        let starts = |list| sections.of(list).map_or(0, |items: &ListItems| items.starts.len());
        assert_eq!(starts(ListName::Services), raw.services.len());
        assert_eq!(starts(ListName::Routes), raw.routes.len());
        assert_eq!(starts(ListName::Policies), raw.security.policies.len());
    }

    #[test]
    fn changed_items_are_parsed_alone() {
        for (before, after) in [
            ("10.1.0.2", "10.1.0.200"),
            ("  - address: 10.1.0.2\n", ""),
            ("- name: last\n", "- name: new\n  ports: [{port: 81, protocol: udp}]\n- name: last\n"),
            ("routes:\n", "- name: new\n  ports: [{port: 81, protocol: udp}]\nroutes:\n"),
            ("- name: last\n  ports: [{port: 80, protocol: tcp}]\n", ""),
            ("# Another.\n", "# Another one.\n"),
            ("/old-path", "/new-path"),
            ("        ports: [81]\n", ""),
            ("methods: [GET]", "methods: [GET, PUT]"),
        ] {
            let text = MESH.replace(before, after);
            let changed = parsed(MESH).changed_to(&version(&text));
            let changed = changed.unwrap_or_else(|| panic!("{before:?} to {after:?}"));
            assert_eq!(
                format!("{:?}", changed.raw),
                format!("{:?}", parsed(&text).raw),
                "{after:?}"
            );
            assert_eq!(changed.sections, ListSections::find(&text), "{after:?}");
        }
    }

    #[test]
    fn change_that_may_affect_other_items_parses_the_whole_file() {
        for (before, after) in [
            ("10.1.0.0/16", "10.2.0.0/16"),
            ("mesh.local", "other.local"),
            ("address: 10.1.0.2", "address: 'unclosed"),
            ("address: 10.1.0.2", "address: &a 10.1.0.2"),
            ("# Another.\n", "---\n"),
            ("name: last", "nam: last"),
            ("routes:\n", "route:\n"),
            ("    revocations: [0a0b]\n", ""),
        ] {
            let text = MESH.replace(before, after);
            let changed = parsed(MESH).changed_to(&version(&text));
            assert!(text == MESH || changed.is_none(), "{before:?} to {after:?}");
        }
    }

    /// Pseudo-random numbers, the same in each run.
    struct RandomNumbers(u64);

    impl RandomNumbers {
        fn below(&mut self, limit: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(self.0 >> 33).expect("31 bits") % limit.max(1)
        }

        /// One edit of a text.
        fn edit(&mut self, text: &str) -> String {
            const PIECES: [&str; 20] = [
                "- name: x\n",
                "  - {address: 10.1.0.9}\n",
                "\"",
                "'",
                "\n",
                "# ",
                "|\n",
                "&a ",
                "*a",
                "---\n",
                "  ",
                "- ",
                ": ",
                "[",
                "]",
                "services:\n",
                "10.1.0.7",
                "security:\n",
                "}",
                "\t",
            ];
            let lines: Vec<&str> = text.split_inclusive('\n').collect();
            let from = self.below(lines.len());
            let to = self.below(lines.len());
            let mut edited: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
            match self.below(5) {
                0 => drop(edited.remove(from)),
                1 => edited.insert(to, lines[from].to_owned()),
                2 => edited.swap(from, to),
                _ => {
                    let line = &mut edited[from];
                    let at = self.below(line.len() + 1);
                    line.insert_str(at, PIECES[self.below(PIECES.len())]);
                }
            }
            edited.concat()
        }
    }

    #[test]
    fn any_edit_gives_the_same_mesh_as_parsing_the_whole_file() {
        let folder = Path::new(".");
        let files = ReferencedFiles::below(folder);
        let mut numbers = RandomNumbers(1);
        let mut valid = 0;
        for _ in 0..1_000 {
            let mut reader = MeshReader::default();
            reader.read(&version(MESH), &files).expect("a valid file");
            let mut text = MESH.to_owned();
            for _ in 0..=numbers.below(3) {
                text = numbers.edit(&text);
            }
            let text = version(&text);
            let unlined = |mesh: Mesh| {
                let warnings = mesh.warnings.iter().map(|warning| warning.text.clone());
                (warnings.collect::<Vec<_>>(), Mesh { warnings: Vec::new(), ..mesh })
            };
            let read = reader.read(&text, &files).map(unlined);
            valid += usize::from(read.is_ok());
            let whole = Mesh::parse(&text, folder).map(unlined);
            assert_eq!(read, whole, "{text}");
            let again = reader.read(&text, &files).map(unlined);
            assert_eq!(again, whole, "{text}");
        }
        assert!(valid > 30, "{valid} of the edits were valid");
    }

    #[test]
    fn errors_have_the_lines_of_the_whole_file() {
        let text = MESH.replace("10.1.0.3", "10.96.0.9").replace("methods: [GET]", "methods: []");
        let problems = Mesh::parse(&text, Path::new(".")).expect_err("two errors");
        let lines: Vec<u64> = problems.iter().map(|problem| problem.line).collect();
        let line = |part| {
            let at = text.lines().position(|line| line.contains(part)).expect("present");
            u64::try_from(at + 1).expect("few")
        };
        assert_eq!(lines, [line("10.96.0.9"), line("methods: []")], "{problems:?}");
    }
}
