//! Reads which modules of a crate import which others, from its sources. Imports of tests do not count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree};

/// A module by the names on the way from the root of its crate. The root is empty.
pub type Module = Vec<String>;

/// The modules of a crate that have files, and the imports between them.
pub struct Imports {
    /// Each module, with its file.
    pub files: BTreeMap<Module, PathBuf>,
    /// From the importing module to the one that has the item. Re-exports are followed; a module's imports
    /// from those inside it are left out.
    pub edges: BTreeSet<(Module, Module)>,
}

/// What one file says.
#[derive(Default)]
struct Source {
    /// Names that other modules find here, and the path that each stands for.
    names: BTreeMap<String, Vec<String>>,
    /// Every path that is imported or named.
    paths: Vec<Vec<String>>,
}

impl Imports {
    /// Reads `src` of the crate in `dir`, which is beside this crate.
    pub fn of(dir: &str) -> Imports {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(dir).join("src");
        let mut files = BTreeMap::new();
        find(&src, &mut Vec::new(), &mut files);
        let read = |file: &PathBuf| Source::read(file);
        let sources: BTreeMap<_, _> =
            files.iter().map(|(at, file)| (at.clone(), read(file))).collect();
        let mut edges = BTreeSet::new();
        for (from, source) in &sources {
            for path in &source.paths {
                let to = resolve(&sources, from, path, 0);
                edges.extend(to.filter(|to| !to.starts_with(from)).map(|to| (from.clone(), to)));
            }
        }
        Imports { files, edges }
    }

    /// Circles among modules that lie side by side in one folder: whatever is inside a module counts as the
    /// module. Every circle of files is one of these, but for those of a module with its own folder.
    pub fn circles(&self) -> Vec<BTreeSet<String>> {
        let mut siblings: BTreeMap<&[String], BTreeSet<(&str, &str)>> = BTreeMap::new();
        for (from, to) in &self.edges {
            let common = from.iter().zip(to).take_while(|(a, b)| a == b).count();
            if let (Some(a), Some(b)) = (from.get(common), to.get(common)) {
                siblings.entry(&from[..common]).or_default().insert((a, b));
            }
        }
        let mut circles = Vec::new();
        for (folder, edges) in siblings {
            let name = |module: &str| [folder, &[module.to_owned()]].concat().join("::");
            let among = circles_of(&edges);
            circles
                .extend(among.iter().map(|c| c.iter().map(|m| name(m)).collect::<BTreeSet<_>>()));
        }
        circles
    }
}

/// Sets of more than one node that all reach each other.
fn circles_of<'a>(edges: &BTreeSet<(&'a str, &'a str)>) -> Vec<BTreeSet<&'a str>> {
    let reach = |from: &'a str| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
        while let Some(at) = next.pop() {
            let out = edges.iter().filter(|(a, _)| *a == at).map(|(_, b)| *b);
            next.extend(out.filter(|b| seen.insert(*b)));
        }
        seen
    };
    let nodes: BTreeSet<&str> = edges.iter().map(|(from, _)| *from).collect();
    let reached: BTreeMap<&str, BTreeSet<&str>> = nodes.iter().map(|n| (*n, reach(n))).collect();
    let both =
        |a: &str, b: &str| reached[a].contains(b) && reached.get(b).is_some_and(|r| r.contains(a));
    let circle =
        |a: &&'a str| nodes.iter().filter(|b| both(a, b)).copied().collect::<BTreeSet<_>>();
    let circles: BTreeSet<BTreeSet<&str>> =
        nodes.iter().map(circle).filter(|c| c.len() > 1).collect();
    circles.into_iter().collect()
}

/// All modules with files under `dir`, whose module is `at`. Files of tests are left out.
fn find(dir: &Path, at: &mut Module, files: &mut BTreeMap<Module, PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        if name == "tests" {
            continue;
        }
        if path.is_dir() {
            at.push(name);
            find(&path, at, files);
            at.pop();
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            let mut module = at.clone();
            let is_root = at.is_empty() && (name == "lib" || name == "main");
            module.extend(Some(name).filter(|name| name != "mod" && !is_root));
            files.insert(module, path);
        }
    }
}

/// The module that has what `path` names when `from` says it; `None` where that is another crate.
fn resolve(
    sources: &BTreeMap<Module, Source>,
    from: &Module,
    path: &[String],
    depth: usize,
) -> Option<Module> {
    let (mut module, mut rest) = (from.clone(), path);
    match rest.first()?.as_str() {
        "crate" => (module, rest) = (Module::new(), &rest[1..]),
        "self" => rest = &rest[1..],
        "super" => {
            while let Some(("super", after)) = rest.split_first().map(|(s, r)| (s.as_str(), r)) {
                module.pop();
                rest = after;
            }
        }
        first if sources.contains_key(&[&from[..], &[first.to_owned()]].concat()) => {}
        first if sources[from].names.contains_key(first) && depth > 0 => {}
        _ => return None,
    }
    while let Some((name, after)) = rest.split_first() {
        let inner = [&module[..], std::slice::from_ref(name)].concat();
        if sources.contains_key(&inner) {
            (module, rest) = (inner, after);
            continue;
        }
        // An item of this module, or of one that it has the name from.
        if let Some(real) = sources.get(&module)?.names.get(name).filter(|_| depth < 8) {
            let real = [&real[..], after].concat();
            return resolve(sources, &module, &real, depth + 1).or(Some(module));
        }
        break;
    }
    Some(module)
}

// === impl Source ===

impl Source {
    fn read(file: &Path) -> Source {
        let text = fs::read_to_string(file).expect("a source file");
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let mut source = Source::default();
        source.visit_file(&parsed);
        source
    }

    fn take(&mut self, tree: &UseTree, before: &mut Vec<String>) {
        match tree {
            UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.take(&path.tree, before);
                before.pop();
            }
            UseTree::Group(group) => group.items.iter().for_each(|item| self.take(item, before)),
            UseTree::Name(name) if name.ident == "self" => {
                let last = before.last().cloned().unwrap_or_default();
                self.note(&last, before.clone());
            }
            UseTree::Name(name) => {
                let name = name.ident.to_string();
                self.note(&name, [&before[..], std::slice::from_ref(&name)].concat());
            }
            UseTree::Rename(name) => {
                let path = [&before[..], &[name.ident.to_string()]].concat();
                self.note(&name.rename.to_string(), path);
            }
            UseTree::Glob(_) => self.paths.push(before.clone()),
        }
    }

    fn note(&mut self, name: &str, path: Vec<String>) {
        self.names.insert(name.to_owned(), path.clone());
        self.paths.push(path);
    }
}

impl<'ast> Visit<'ast> for Source {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes: &[Attribute] = match item {
            Item::Mod(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            _ => &[],
        };
        if !attributes.iter().any(is_of_tests) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.take(&item.tree, &mut Vec::new());
    }

    /// `pub(in crate::a)` names a module and imports nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if names.len() > 1 && ["crate", "super", "self"].contains(&names[0].as_str()) {
            self.paths.push(names);
        }
        visit::visit_path(self, path);
    }
}

fn is_of_tests(attribute: &Attribute) -> bool {
    let told = attribute.meta.require_list().map(|list| list.tokens.to_string());
    attribute.path().is_ident("cfg") && told.is_ok_and(|tokens| tokens == "test")
}
