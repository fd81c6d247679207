//! Regular expressions with RE2's syntax and meaning, as Envoy uses them. They match a whole text.

use std::fmt;

use regex::bytes::{Regex, RegexBuilder};
use regex_syntax::ast::{self, Ast};

/// The most memory of one compiled expression, in bytes.
const SIZE_LIMIT_BYTES: usize = 1 << 20;
/// The longest expression, in bytes.
const LENGTH_LIMIT_BYTES: usize = 4096;
/// How deep groups may nest.
const NEST_LIMIT: u32 = 64;

/// A regular expression in RE2's syntax (`envoy.type.matcher.v3.RegexMatcher`). Matching takes time
/// linear in the text.
///
/// Expression and text are bytes, as in Envoy, which compiles with RE2's Latin-1 option: `.` matches one byte, so `..`
/// matches `\u{e9}` (two bytes of UTF-8), and a byte that is not UTF-8 matches too. Measured with Envoy 1.40.
#[derive(Clone)]
pub struct Pattern {
    source: String,
    /// The expression, anchored at both ends.
    whole: Regex,
    /// The same without anchors, for replacements.
    part: Regex,
}

impl Pattern {
    /// Compiles an expression.
    ///
    /// # Errors
    /// When the expression is invalid, is too large, or has another meaning in RE2 than in the `regex` crate.
    pub fn parse(source: &str) -> Result<Self, String> {
        let invalid = |reason: &dyn fmt::Display| {
            let reason = reason.to_string();
            let reason = reason.lines().last().unwrap_or_default().to_owned();
            format!("invalid regular expression {source:?}: {reason}")
        };
        if source.len() > LENGTH_LIMIT_BYTES {
            return Err(format!(
                "invalid regular expression of {} bytes: must be at most {LENGTH_LIMIT_BYTES}",
                source.len()
            ));
        }
        let bytes = as_bytes(source).map_err(|reason| invalid(&reason))?;
        let mut parser = ast::parse::ParserBuilder::new().nest_limit(NEST_LIMIT).build();
        let parsed = parser.parse(&bytes).map_err(|error| invalid(&error))?;
        let translated =
            ast::visit(&parsed, Translation::of(&bytes)).map_err(|reason| invalid(&reason))?;
        let compile = |expression: &str| {
            let mut builder = RegexBuilder::new(expression);
            builder
                .unicode(false)
                .size_limit(SIZE_LIMIT_BYTES)
                .build()
                .map_err(|error| invalid(&error))
        };
        let whole = compile(&format!(r"\A(?:{translated})\z"))?;
        Ok(Self { source: source.to_owned(), whole, part: compile(&translated)? })
    }

    /// The expression as written in the configuration.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the expression matches the whole text.
    #[must_use]
    pub fn matches(&self, text: impl AsRef<[u8]>) -> bool {
        self.whole.is_match(text.as_ref())
    }

    /// The number of capture groups.
    fn groups(&self) -> usize {
        self.part.captures_len() - 1
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.source)
    }
}

/// Writes each byte beyond ASCII as an escape.
fn as_bytes(source: &str) -> Result<String, &'static str> {
    let mut out = String::with_capacity(source.len());
    let mut is_escaped = false;
    for character in source.chars() {
        if character.is_ascii() {
            out.push(character);
            is_escaped = character == '\\' && !is_escaped;
            continue;
        }
        if is_escaped {
            return Err("only ASCII characters can be escaped");
        }
        let mut utf8 = [0; 4];
        for byte in character.encode_utf8(&mut utf8).bytes() {
            out.push_str(&format!("\\x{byte:02X}"));
        }
    }
    Ok(out)
}

/// Translates an RE2 expression to one of the `regex` crate. In RE2, `\s` does not match a vertical tab. Nested classes
/// and set operators are plain characters in RE2; they are refused. Case-insensitive matching of non-ASCII characters
/// is refused too: it works with Latin-1, but not with bytes.
struct Translation<'s> {
    source: &'s str,
    out: String,
    written: usize,
    ignores_case: bool,
    is_beyond_ascii: bool,
}

impl<'s> Translation<'s> {
    fn of(source: &'s str) -> Self {
        Self {
            source,
            out: String::with_capacity(source.len()),
            written: 0,
            ignores_case: false,
            is_beyond_ascii: false,
        }
    }

    /// Replaces the source at `span` by `text`.
    fn replace(&mut self, span: &ast::Span, text: &str) {
        let before = self.source.get(self.written..span.start.offset).unwrap_or_default();
        self.out.push_str(before);
        self.out.push_str(text);
        self.written = span.end.offset;
    }

    fn perl(&mut self, class: &ast::ClassPerl) {
        match (&class.kind, class.negated) {
            (ast::ClassPerlKind::Space, false) => self.replace(&class.span, r"[\t\n\f\r ]"),
            (ast::ClassPerlKind::Space, true) => self.replace(&class.span, r"[^\t\n\f\r ]"),
            _ => {}
        }
    }

    fn literal(&mut self, literal: &ast::Literal) {
        self.is_beyond_ascii |= !literal.c.is_ascii();
    }

    /// Accepts the flags of RE2: `i`, `m`, `s` and `U`.
    fn flags(&mut self, flags: &ast::Flags) -> Result<(), &'static str> {
        for item in &flags.items {
            match item.kind {
                ast::FlagsItemKind::Flag(ast::Flag::CaseInsensitive) => self.ignores_case = true,
                ast::FlagsItemKind::Negation
                | ast::FlagsItemKind::Flag(
                    ast::Flag::MultiLine | ast::Flag::DotMatchesNewLine | ast::Flag::SwapGreed,
                ) => {}
                ast::FlagsItemKind::Flag(_) => {
                    return Err("unsupported flag: must be i, m, s or U");
                }
            }
        }
        Ok(())
    }
}

impl ast::Visitor for Translation<'_> {
    type Output = String;
    type Err = &'static str;

    fn finish(mut self) -> Result<String, &'static str> {
        if self.ignores_case && self.is_beyond_ascii {
            return Err("(?i) is not supported with non-ASCII characters");
        }
        self.out.push_str(self.source.get(self.written..).unwrap_or_default());
        Ok(self.out)
    }

    fn visit_pre(&mut self, ast: &Ast) -> Result<(), &'static str> {
        match ast {
            Ast::ClassPerl(class) => self.perl(class),
            Ast::Literal(literal) => self.literal(literal),
            Ast::Assertion(assertion) => match assertion.kind {
                ast::AssertionKind::WordBoundary
                | ast::AssertionKind::NotWordBoundary
                | ast::AssertionKind::StartLine
                | ast::AssertionKind::EndLine
                | ast::AssertionKind::StartText
                | ast::AssertionKind::EndText => {}
                _ => return Err("unsupported word boundary: must be \\b or \\B"),
            },
            Ast::Flags(set) => self.flags(&set.flags)?,
            Ast::Group(group) => {
                if let ast::GroupKind::NonCapturing(set) = &group.kind {
                    self.flags(set)?;
                }
            }
            Ast::Empty(_)
            | Ast::Dot(_)
            | Ast::ClassUnicode(_)
            | Ast::ClassBracketed(_)
            | Ast::Repetition(_)
            | Ast::Alternation(_)
            | Ast::Concat(_) => {}
        }
        Ok(())
    }

    fn visit_class_set_item_pre(&mut self, item: &ast::ClassSetItem) -> Result<(), &'static str> {
        match item {
            ast::ClassSetItem::Bracketed(_) => Err("a bracket within brackets must be written \\["),
            ast::ClassSetItem::Perl(class) => {
                self.perl(class);
                Ok(())
            }
            ast::ClassSetItem::Literal(literal) => {
                self.literal(literal);
                Ok(())
            }
            ast::ClassSetItem::Range(range) => {
                self.literal(&range.start);
                self.literal(&range.end);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn visit_class_set_binary_op_pre(
        &mut self,
        _: &ast::ClassSetBinaryOp,
    ) -> Result<(), &'static str> {
        Err("&&, -- and ~~ within brackets are not supported")
    }
}

/// An expression and the replacement of its matches
/// (`envoy.type.matcher.v3.RegexMatchAndSubstitute`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Substitution {
    pattern: Pattern,
    /// The replacement as written in the configuration.
    text: String,
    parts: Vec<ReplacementPart>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ReplacementPart {
    Text(String),
    /// A capture group; 0 is the whole match.
    Group(usize),
}

impl Substitution {
    /// Parses a replacement, in which `\0` to `\9` are groups and `\\` is a backslash.
    ///
    /// # Errors
    /// When the expression has no such group, or a backslash is followed by another character.
    pub fn parse(pattern: Pattern, text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut characters = text.chars();
        while let Some(character) = characters.next() {
            if character != '\\' {
                plain.push(character);
                continue;
            }
            match characters.next() {
                Some('\\') => plain.push('\\'),
                Some(digit @ '0'..='9') => {
                    let group = digit.to_digit(10).unwrap_or(0) as usize;
                    if group > pattern.groups() {
                        return Err(format!(
                            "invalid substitution {text:?}: \\{group} is not a group, the expression has {}",
                            pattern.groups()
                        ));
                    }
                    if !plain.is_empty() {
                        parts.push(ReplacementPart::Text(std::mem::take(&mut plain)));
                    }
                    parts.push(ReplacementPart::Group(group));
                }
                _ => {
                    return Err(format!(
                        "invalid substitution {text:?}: a digit or \\ must follow a \\"
                    ));
                }
            }
        }
        if !plain.is_empty() {
            parts.push(ReplacementPart::Text(plain));
        }
        Ok(Self { pattern, text: text.to_owned(), parts })
    }

    /// The expression.
    #[must_use]
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// The replacement as written in the configuration.
    #[must_use]
    pub fn replacement(&self) -> &str {
        &self.text
    }

    /// The text with every match replaced.
    #[must_use]
    pub fn apply(&self, text: &str) -> String {
        let replaced =
            self.pattern.part.replace_all(text.as_bytes(), |found: &regex::bytes::Captures<'_>| {
                let mut out = Vec::new();
                for part in &self.parts {
                    match part {
                        ReplacementPart::Text(text) => out.extend_from_slice(text.as_bytes()),
                        ReplacementPart::Group(group) => {
                            out.extend_from_slice(
                                found.get(*group).map_or(&[], |group| group.as_bytes()),
                            );
                        }
                    }
                }
                out
            });
        String::from_utf8_lossy(&replaced).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expression_matches_the_whole_text() {
        let check = |source: &str, text: &str, expected: bool| {
            let pattern = Pattern::parse(source).expect(source);
            assert_eq!(pattern.matches(text), expected, "{source} {text}");
        };
        check("a+", "aaa", true);
        check("a+", "baaa", false);
        check("a|ab", "ab", true);
        check("^/v[0-9]$", "/v1", true);
        check(r"\d+", "12", true);
        check(r"\d+", "\u{661}", false);
        check(r"[\w-]+", "a-b", true);
        check(r"[\w-]+", "\u{e9}", false);
        check("(?i)abc", "ABC", true);
        check("", "", true);
        check("", "a", false);
        check("a.c", "a\nc", false);
        check(r"a\s", "a\u{b}", false);
        // Byte by byte, as in Envoy.
        check(".", "\u{e9}", false);
        check("..", "\u{e9}", true);
        check("\u{e9}", "\u{e9}", true);
        check("x\u{e9}+", "x\u{e9}\u{e9}", false);
        check("[\u{e9}]+", "\u{e9}", true);
        check(r"a\\é", r"a\é", true);
        assert!(Pattern::parse(r".\xff").expect("an expression").matches(b"\xff\xff"));
    }

    #[test]
    fn expressions_with_another_meaning_in_re2_are_refused() {
        let long = "a".repeat(LENGTH_LIMIT_BYTES + 1);
        for source in [
            "(",
            r"\é",
            "(?i)é",
            r"(?i)[\xe0-\xff]",
            r"\pL",
            "[a&&b]",
            "[[a]b]",
            "(?x)a b",
            "a{,3}",
            r"\Ca",
            "(?=a)",
            "(a{1000}){1000}",
            &long,
        ] {
            assert!(Pattern::parse(source).is_err(), "{source}");
        }
    }

    #[test]
    fn substitution_replaces_every_match() {
        let check = |source: &str, to: &str, text: &str, expected: &str| {
            let pattern = Pattern::parse(source).expect(source);
            let substitution = Substitution::parse(pattern, to).expect(to);
            assert_eq!(substitution.apply(text), expected, "{source} {to}");
        };
        check("^/old/(.*)$", r"/new/\1", "/old/x", "/new/x");
        check("(a)(b)?", r"[\1\2\\]", "ab a", r"[ab\] [a\]");
        check("x", "", "axbx", "ab");
        let pattern = Pattern::parse("(a)").expect("an expression");
        for to in [r"\2", r"\a", r"\"] {
            assert!(Substitution::parse(pattern.clone(), to).is_err(), "{to}");
        }
    }
}
