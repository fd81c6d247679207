//! Modules of a crate import each other in one direction. Only a module and one of its children may import each other.
//!
//! [`CrateModules`] reads what each module of a crate imports and names, [`imports`](CrateModules::imports) resolves the
//! names to the files that define them, and [`cycles`] finds the files that depend on each other. Re-exports are
//! followed, so an item costs a dependency on the module that defines it. Importing a module costs nothing; naming
//! an item through it does. Code for tests, strings and comments are ignored. An inline module counts as its file.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Ident, ImplItemFn, Item, ItemMod, Macro, Meta, UseTree, Visibility};

use super::tree::{File, tree};

/// Longer chains of re-exports are not followed.
const REEXPORT_LIMIT: usize = 8;

/// The names of a module and the modules around it, outermost first. The root of a crate has none.
type ModulePath = Vec<String>;

/// What a module defines, imports and names.
#[derive(Default)]
struct ModuleNames {
    /// The module whose file contains the code: itself, or the module around an inline one.
    file: ModulePath,
    /// Items defined here.
    items: BTreeSet<String>,
    /// Paths of `use` declarations, by the name that they have here.
    imports: BTreeMap<String, Vec<String>>,
    /// Paths of `use path::*`.
    globs: Vec<Vec<String>>,
    /// Other paths of two or more segments.
    paths: Vec<Vec<String>>,
}

/// The modules of a crate.
#[derive(Default)]
struct CrateModules {
    modules: BTreeMap<ModulePath, ModuleNames>,
}

/// The imported names of each file of a crate, by the file that defines them.
type Imports = BTreeMap<ModulePath, BTreeMap<ModulePath, BTreeSet<String>>>;

/// An item, or a module if `name` is empty.
struct Definition {
    module: ModulePath,
    name: Vec<String>,
}

impl CrateModules {
    /// Reads the crate in a source folder: its root, and each module that its files declare.
    fn read(folder: &str, root: &File, files: &BTreeMap<&str, &File>) -> Self {
        let mut read = Self::default();
        let mut pending = vec![(ModulePath::new(), root)];
        while let Some((path, file)) = pending.pop() {
            let code = syn::parse_file(&file.text);
            let code = code.unwrap_or_else(|error| cannot_parse(file, &error));
            let mut collector = Collector {
                read: &mut read,
                file: path.clone(),
                module: path.clone(),
                declared: Vec::new(),
            };
            collector.enter(path);
            collector.visit_file(&code);
            for declared in collector.declared {
                let base = format!("{folder}/{}", declared.join("/"));
                let names = [format!("{base}.rs"), format!("{base}/mod.rs")];
                let file = names.iter().find_map(|name| files.get(name.as_str()));
                pending.extend(file.map(|file| (declared, *file)));
            }
        }
        read
    }

    /// What each file imports from which other file.
    fn imports(&self) -> Imports {
        let mut imports = Imports::new();
        for (module, names) in &self.modules {
            let mut add = |target: &ModulePath, name: &str| {
                let Some(target) = self.modules.get(target) else { return };
                if target.file != names.file {
                    let of_file = imports.entry(names.file.clone()).or_default();
                    of_file.entry(target.file.clone()).or_default().insert(name.to_owned());
                }
            };
            for path in names.imports.values().chain(&names.paths) {
                let definition = self.resolve(module, path);
                if let Some(Definition { module, name }) = definition
                    && let Some(name) = name.first()
                {
                    add(&module, name);
                }
            }
            for path in &names.globs {
                if let Some(definition) = self.resolve(module, path) {
                    add(&definition.module, "*");
                }
            }
        }
        imports
    }

    /// Where a path of a module leads; none for paths to other crates.
    fn resolve(&self, module: &ModulePath, path: &[String]) -> Option<Definition> {
        Some(self.definition(&self.absolute(module, path, REEXPORT_LIMIT)?, REEXPORT_LIMIT))
    }

    /// A path of a module as a path from the root of the crate.
    fn absolute(&self, module: &ModulePath, path: &[String], limit: usize) -> Option<Vec<String>> {
        let (first, rest) = path.split_first()?;
        let child = [module.as_slice(), std::slice::from_ref(first)].concat();
        match first.as_str() {
            "crate" => Some(rest.to_vec()),
            "self" => Some([module, rest].concat()),
            "super" => {
                let (_, parent) = module.split_last()?;
                match rest.first().map(String::as_str) {
                    Some("super") => self.absolute(&parent.to_vec(), rest, limit),
                    _ => Some([parent, rest].concat()),
                }
            }
            _ if self.modules.contains_key(&child) => Some([&child, rest].concat()),
            _ => {
                let import = self.modules.get(module)?.imports.get(first)?;
                let import = self.absolute(module, import, limit.checked_sub(1)?)?;
                Some([&import, rest].concat())
            }
        }
    }

    /// What a path from the root names, through re-exports.
    fn definition(&self, path: &[String], limit: usize) -> Definition {
        let is_module = |length: &usize| {
            path.get(..*length).is_some_and(|module| self.modules.contains_key(module))
        };
        let length = (0..=path.len()).rev().find(is_module).unwrap_or_default();
        let module = path.get(..length).unwrap_or_default().to_vec();
        let name = path.get(length..).unwrap_or_default().to_vec();
        let definition = Definition { module, name };
        match limit.checked_sub(1).and_then(|limit| self.reexported(&definition, limit)) {
            Some(path) => self.definition(&path, limit.saturating_sub(1)),
            None => definition,
        }
    }

    /// The path from the root that a module imports an item from; none if the module defines the item.
    fn reexported(&self, definition: &Definition, limit: usize) -> Option<Vec<String>> {
        let module = &definition.module;
        let names = self.modules.get(module)?;
        let (first, rest) = definition.name.split_first()?;
        if names.items.contains(first) {
            return None;
        }
        if let Some(import) = names.imports.get(first) {
            return Some([self.absolute(module, import, limit)?.as_slice(), rest].concat());
        }
        names.globs.iter().find_map(|glob| {
            let glob = self.absolute(module, glob, limit)?;
            let globbed = self.modules.get(&glob)?;
            let has = globbed.items.contains(first) || globbed.imports.contains_key(first);
            has.then(|| [&glob, &definition.name].map(Vec::as_slice).concat())
        })
    }
}

#[expect(clippy::panic, reason = "the compiler accepts the file, so the parser must")]
fn cannot_parse(file: &File, error: &syn::Error) -> syn::File {
    panic!("{}: {error}", file.path)
}

/// Collects the names of a file's modules.
struct Collector<'c> {
    read: &'c mut CrateModules,
    file: ModulePath,
    /// The module that is being read.
    module: ModulePath,
    /// Modules in other files.
    declared: Vec<ModulePath>,
}

impl Collector<'_> {
    fn enter(&mut self, module: ModulePath) {
        let names = ModuleNames { file: self.file.clone(), ..ModuleNames::default() };
        self.read.modules.insert(module.clone(), names);
        self.module = module;
    }

    fn names(&mut self) -> &mut ModuleNames {
        self.read.modules.entry(self.module.clone()).or_default()
    }

    fn add_path(&mut self, path: Vec<String>) {
        if path.len() > 1 {
            self.names().paths.push(path);
        }
    }

    fn add_use(&mut self, tree: &UseTree, mut before: Vec<String>) {
        match tree {
            UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.add_use(&path.tree, before);
            }
            UseTree::Name(name) => self.add_import(before, &name.ident, &name.ident),
            UseTree::Rename(renamed) => self.add_import(before, &renamed.ident, &renamed.rename),
            UseTree::Glob(_) => self.names().globs.push(before),
            UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.add_use(tree, before.clone()));
            }
        }
    }

    fn add_import(&mut self, mut path: Vec<String>, item: &Ident, name: &Ident) {
        let mut name = name.to_string();
        if item != "self" {
            path.push(item.to_string());
        } else if name == "self" {
            name = path.last().cloned().unwrap_or_default();
        }
        if name == "_" {
            // A trait without a name here.
            self.add_path(path);
        } else {
            self.names().imports.insert(name, path);
        }
    }

    /// Adds the paths of a macro's arguments, whose syntax only the macro knows.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut path = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.add_path(std::mem::take(&mut path));
                    }
                    path.push(ident.to_string());
                    colons = 0;
                }
                other => {
                    self.add_path(std::mem::take(&mut path));
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.add_tokens(group.stream());
                    }
                }
            }
        }
        self.add_path(path);
    }
}

impl<'ast> Visit<'ast> for Collector<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let head = ItemHead::of(item);
        if is_for_tests(head.attributes) {
            return;
        }
        if let Some(name) = head.name {
            self.names().items.insert(name.to_string());
        }
        match item {
            Item::Use(import) if import.leading_colon.is_none() => {
                self.add_use(&import.tree, Vec::new());
            }
            _ => visit::visit_item(self, item),
        }
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        let outer = self.module.clone();
        let path = [outer.as_slice(), &[module.ident.to_string()]].concat();
        match &module.content {
            Some((_, items)) => {
                self.enter(path);
                items.iter().for_each(|item| self.visit_item(item));
                self.module = outer;
            }
            None => self.declared.push(path),
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast ImplItemFn) {
        if !is_for_tests(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            self.add_path(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        self.visit_path(&call.path);
        self.add_tokens(call.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if let Meta::List(list) = &attribute.meta {
            self.add_tokens(list.tokens.clone());
        }
    }

    /// `pub(in path)` names no item.
    fn visit_visibility(&mut self, _: &'ast Visibility) {}
}

/// The attributes of an item, and the name that paths give to it.
struct ItemHead<'a> {
    attributes: &'a [Attribute],
    name: Option<&'a Ident>,
}

impl<'a> ItemHead<'a> {
    fn of(item: &'a Item) -> Self {
        let named = |attributes, name| Self { attributes, name: Some(name) };
        let unnamed = |attributes| Self { attributes, name: None };
        match item {
            Item::Const(item) => named(&item.attrs, &item.ident),
            Item::Enum(item) => named(&item.attrs, &item.ident),
            Item::Fn(item) => named(&item.attrs, &item.sig.ident),
            Item::Static(item) => named(&item.attrs, &item.ident),
            Item::Struct(item) => named(&item.attrs, &item.ident),
            Item::Trait(item) => named(&item.attrs, &item.ident),
            Item::Type(item) => named(&item.attrs, &item.ident),
            Item::Union(item) => named(&item.attrs, &item.ident),
            Item::Macro(item) => Self { attributes: &item.attrs, name: item.ident.as_ref() },
            Item::Impl(item) => unnamed(&item.attrs),
            Item::Mod(item) => unnamed(&item.attrs),
            Item::Use(item) => unnamed(&item.attrs),
            _ => unnamed(&[]),
        }
    }
}

/// Whether the item is compiled for tests only.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    let requires_test = |attribute: &Attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            let condition = list.tokens.to_string();
            super::holds_word(&condition, "test") && !super::holds_word(&condition, "not")
        }
        _ => false,
    };
    attributes.iter().any(requires_test)
}

/// Files that depend on each other, each with what it imports from which of the others.
fn cycles(imports: &Imports) -> Vec<Imports> {
    let reachable: BTreeMap<&ModulePath, BTreeSet<&ModulePath>> =
        imports.keys().map(|file| (file, reachable_from(file, imports))).collect();
    let reaches = |from, to| reachable.get(from).is_some_and(|files| files.contains(to));
    let mut found = BTreeSet::new();
    for file in imports.keys() {
        let mutual = imports.keys().filter(|other| reaches(file, *other) && reaches(*other, file));
        let mutual: Vec<&ModulePath> = mutual.collect();
        if mutual.len() > 1 {
            found.insert(mutual);
        }
    }
    let within = |files: Vec<&ModulePath>| -> Imports {
        let of_file = |file: &ModulePath| {
            let mut imported = imports.get(file).cloned().unwrap_or_default();
            imported.retain(|target, _| files.contains(&target));
            (file.clone(), imported)
        };
        files.iter().map(|file| of_file(file)).collect()
    };
    found.into_iter().map(within).collect()
}

fn reachable_from<'i>(start: &'i ModulePath, imports: &'i Imports) -> BTreeSet<&'i ModulePath> {
    let mut reached = BTreeSet::new();
    let mut pending = vec![start];
    while let Some(file) = pending.pop() {
        for target in imports.get(file).into_iter().flat_map(BTreeMap::keys) {
            if reached.insert(target) {
                pending.push(target);
            }
        }
    }
    reached
}

/// Whether a cycle is of a module with one of its children.
fn is_parent_with_child(cycle: &Imports) -> bool {
    let mut files = cycle.keys();
    let (Some(first), Some(second), None) = (files.next(), files.next(), files.next()) else {
        return false;
    };
    // A parent sorts before its children.
    second.split_last().is_some_and(|(_, parent)| parent == first.as_slice())
}

/// The cycles of the crates, except a module with one of its children.
pub(crate) fn import_cycles(files: &[File]) -> Vec<String> {
    let by_path: BTreeMap<&str, &File> = files.iter().map(|f| (f.path.as_str(), f)).collect();
    let roots = files.iter().filter_map(|file| {
        let has_library = |folder| by_path.contains_key(format!("{folder}/lib.rs").as_str());
        let (folder, name) = file.path.rsplit_once('/')?;
        let is_root = name == "lib.rs" || name == "main.rs" && !has_library(folder);
        (is_root && (folder == "src" || folder.ends_with("/src"))).then_some((folder, file))
    });
    roots
        .flat_map(|(folder, root)| {
            let mut cycles = cycles(&CrateModules::read(folder, root, &by_path).imports());
            cycles.retain(|cycle| !is_parent_with_child(cycle));
            cycles.iter().map(|cycle| description(folder, cycle)).collect::<Vec<_>>()
        })
        .collect()
}

fn description(folder: &str, cycle: &Imports) -> String {
    let shown = |module: &ModulePath| match module.as_slice() {
        [] => "the crate root".to_owned(),
        names => names.join("::"),
    };
    let mut text = format!(
        "{folder}: {} modules depend on each other; break the cycle by moving an item:",
        cycle.len()
    );
    for (module, imports) in cycle {
        for (from, names) in imports {
            let names = names.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            text += &format!("\n    {} imports from {}: {names}", shown(module), shown(from));
        }
    }
    text
}

#[test]
fn modules_have_no_import_cycles() {
    super::hold(&import_cycles(&tree()));
}
