//! Finds where the items of the long lists of `mesh.yaml` begin in its text.
//!
//! It examines lines and indentation only, so the caller must compare the number of items with the parser's.

use std::ops::Range;

/// A list whose length grows with the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ListName {
    Services,
    Routes,
    Policies,
}

impl ListName {
    /// Every list.
    pub(super) const ALL: [Self; 3] = [Self::Services, Self::Routes, Self::Policies];

    /// The field path of the list.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Routes => "routes",
            Self::Policies => "security.policies",
        }
    }

    /// The list that begins at a key of the root or of `security`.
    fn opened_by(parent: Option<&str>, key: &str) -> Option<Self> {
        match (parent, key) {
            (None, "services") => Some(Self::Services),
            (None, "routes") => Some(Self::Routes),
            (Some("security"), "policies") => Some(Self::Policies),
            _ => None,
        }
    }
}

/// The items of a list in block style.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ListItems {
    /// The indentation of each item's dash.
    pub(super) indent: usize,
    /// The byte offset of each item's line.
    pub(super) starts: Vec<usize>,
    /// The number of lines before each item.
    pub(super) lines: Vec<u64>,
    /// The byte offset of the line after the last item.
    pub(super) end: usize,
}

impl ListItems {
    fn push(&mut self, line: &TextLine<'_>) {
        self.starts.push(line.offset);
        self.lines.push(line.number);
    }

    /// The byte range of some items.
    pub(super) fn span(&self, items: Range<usize>) -> Option<Range<usize>> {
        let start = *self.starts.get(items.start)?;
        let end =
            if items.end == self.starts.len() { self.end } else { *self.starts.get(items.end)? };
        (start <= end).then_some(start..end)
    }
}

/// The items of each list in block style. None for lists in flow style.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ListSections([Option<ListItems>; 3]);

impl ListSections {
    /// Finds the items in a text.
    pub(super) fn find(text: &str) -> Self {
        let mut found = Self::default();
        let mut scan = SectionScan::default();
        let mut offset = 0;
        for (number, line) in (0..).zip(text.split_inclusive('\n')) {
            if let Some(line) = TextLine::of(line, offset, number) {
                scan.take(&line, &mut found);
            }
            offset += line.len();
        }
        scan.close(offset, &mut found);
        found
    }

    /// The items of a list.
    pub(super) fn of(&self, list: ListName) -> Option<&ListItems> {
        let [services, routes, policies] = &self.0;
        match list {
            ListName::Services => services.as_ref(),
            ListName::Routes => routes.as_ref(),
            ListName::Policies => policies.as_ref(),
        }
    }

    fn set(&mut self, list: ListName, items: ListItems) {
        let [services, routes, policies] = &mut self.0;
        let place = match list {
            ListName::Services => services,
            ListName::Routes => routes,
            ListName::Policies => policies,
        };
        *place = Some(items);
    }
}

/// A line that is neither empty nor a comment.
struct TextLine<'t> {
    indent: usize,
    text: &'t str,
    /// Its byte offset.
    offset: usize,
    /// The number of lines before it.
    number: u64,
}

impl<'t> TextLine<'t> {
    fn of(line: &'t str, offset: usize, number: u64) -> Option<Self> {
        let text = line.trim_start_matches(' ');
        let indent = line.len() - text.len();
        let text = text.trim_end();
        (!text.is_empty() && !text.starts_with('#')).then_some(Self {
            indent,
            text,
            offset,
            number,
        })
    }

    fn is_item(&self) -> bool {
        self.text == "-" || self.text.starts_with("- ")
    }

    /// The key, and whether its value begins in a later line.
    fn key(&self) -> Option<(&'t str, bool)> {
        let (key, value) = self.text.split_once(':')?;
        let value = value.trim_start();
        Some((key, value.is_empty() || value.starts_with('#')))
    }
}

/// The state of the scan before the next line.
#[derive(Default)]
struct SectionScan<'t> {
    /// The present key of the root, and the indentation of the keys below it.
    parent: Option<(&'t str, Option<usize>)>,
    open: Option<OpenList>,
}

/// The list that the next line may belong to.
struct OpenList {
    list: ListName,
    /// The indentation of its key.
    key_indent: usize,
    /// None before its first item.
    items: Option<ListItems>,
}

impl<'t> SectionScan<'t> {
    fn take(&mut self, line: &TextLine<'t>, found: &mut ListSections) {
        if let Some(open) = &mut self.open {
            match &mut open.items {
                Some(items) if line.indent > items.indent => return,
                Some(items) if line.indent == items.indent && line.is_item() => {
                    items.push(line);
                    return;
                }
                None if line.indent >= open.key_indent && line.is_item() => {
                    let mut items = ListItems { indent: line.indent, ..ListItems::default() };
                    items.push(line);
                    open.items = Some(items);
                    return;
                }
                Some(_) | None => self.close(line.offset, found),
            }
        }
        self.take_key(line);
    }

    fn take_key(&mut self, line: &TextLine<'t>) {
        let Some((key, is_open)) = line.key() else { return };
        let parent = match &mut self.parent {
            _ if line.indent == 0 => None,
            Some((parent, indent)) => {
                if *indent.get_or_insert(line.indent) != line.indent {
                    return;
                }
                Some(*parent)
            }
            None => return,
        };
        if line.indent == 0 {
            self.parent = Some((key, None));
        }
        if let Some(list) = ListName::opened_by(parent, key).filter(|_| is_open) {
            self.open = Some(OpenList { list, key_indent: line.indent, items: None });
        }
    }

    /// Records the items of the list that has ended.
    fn close(&mut self, offset: usize, found: &mut ListSections) {
        if let Some(OpenList { list, items: Some(items), .. }) = self.open.take() {
            found.set(list, ListItems { end: offset, ..items });
        }
    }
}
