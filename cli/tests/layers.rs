//! The walls of the house: which part of a crate may import which. Each crate in the table has layers, the
//! lowest first. A part imports lower layers only, and no module is in a circle with its siblings, but for the
//! circles that are listed.

mod imports;

use std::collections::BTreeSet;

use imports::{Imports, Module};

/// The layers of one crate.
struct House {
    /// Folder of the crate in the workspace.
    dir: &'static str,
    /// Modules below the crate's root (`a`, or `a::b` for a part of `a`), in layers, the lowest first. Those of
    /// one layer stand side by side and do not import each other. Every file but `lib.rs` and `main.rs` is in
    /// one of them.
    layers: &'static [&'static [&'static str]],
    /// Sets of siblings that may import each other: one idea in several files.
    circles: &'static [&'static [&'static str]],
}

const HOUSES: &[House] = &[
    House {
        dir: "transfer",
        layers: &[
            &["image"],
            &["memory"],
            &["link"],
            &["delta"],
            &["send"],
            &["receive"],
            &["external"],
        ],
        // What a block is, and the loops over it that are compiled once for each kind of CPU.
        circles: &[&["delta::block", "delta::cpu", "delta::masks"]],
    },
    House {
        dir: "manager",
        layers: &[
            &["ledger"],
            &["event"],
            &["action"],
            &["timer", "need"],
            &["outbox"],
            // The owners do not know each other, nor the core.
            &["fleet", "job", "rollout", "weights"],
            &["core"],
            &["error"],
            &["announce", "config"],
            &["view"],
            &["wire"],
            &["driver"],
            &["server"],
        ],
        circles: &[],
    },
    House {
        dir: "trainer",
        layers: &[
            &["verdict"],
            &["error"],
            &["trajectory", "retry", "config"],
            &["client"],
            &["session"],
            &["stream"],
            &["group"],
            &["submit", "consume", "versions", "control"],
            &["publish"],
            &["job"],
        ],
        circles: &[],
    },
];

#[test]
fn imports_run_from_higher_layers_to_lower_ones() {
    for House { dir, layers, .. } in HOUSES {
        let imports = Imports::of(dir);
        let wrong = wrong_ways(&imports, layers);
        assert!(wrong.is_empty(), "{dir}:\n{}", wrong.join("\n"));
    }
}

#[test]
fn no_module_is_in_a_circle_with_its_siblings() {
    for House { dir, circles, .. } in HOUSES {
        let found = Imports::of(dir).circles();
        let known: Vec<BTreeSet<String>> =
            circles.iter().map(|c| c.iter().map(|m| (*m).to_owned()).collect()).collect();
        let new: Vec<_> = found.iter().filter(|circle| !known.contains(circle)).collect();
        assert!(new.is_empty(), "{dir}: circles {new:?}");
        let gone: Vec<_> = known.iter().filter(|circle| !found.contains(circle)).collect();
        assert!(gone.is_empty(), "{dir}: take these out of the table, they are gone: {gone:?}");
    }
}

#[test]
fn an_import_against_the_layers_is_found() {
    let imports = Imports::of("transfer");
    let turned: &[&[&str]] = &[&["receive"], &["send"], &["image", "memory", "link", "delta"]];
    let wrong = wrong_ways(&imports, turned);
    let has = |text: &str| wrong.iter().any(|line| line.contains(text));
    assert!(has("receive::fetch::pool imports link"), "{wrong:?}");
    assert!(has("delta::memory imports image::blob"), "side by side: {wrong:?}");
    assert!(has("external is in no layer"), "{wrong:?}");
}

/// A line for each import that does not run downwards, and each file that is in no layer.
fn wrong_ways(imports: &Imports, layers: &[&[&str]]) -> Vec<String> {
    let named =
        |module: &Module| if module.is_empty() { "lib.rs".to_owned() } else { module.join("::") };
    let place = |module: &Module| {
        let name = named(module);
        let rooms = layers
            .iter()
            .enumerate()
            .flat_map(|(rank, rooms)| rooms.iter().map(move |r| (rank, *r)));
        // The longest name is the nearest.
        rooms.filter(|(_, room)| is_in(&name, room)).max_by_key(|(_, room)| room.len())
    };
    let homeless = imports.files.keys().filter(|m| !m.is_empty() && place(m).is_none());
    let homeless = homeless.map(|module| format!("{} is in no layer", named(module)));
    let wrong = imports.edges.iter().filter_map(|(from, to)| {
        let ((above, room), below) = (place(from)?, place(to));
        let is_fine = below.is_some_and(|(below, other)| below < above || other == room);
        (!is_fine).then(|| format!("{} imports {}", named(from), named(to)))
    });
    homeless.chain(wrong).collect()
}

fn is_in(module: &str, room: &str) -> bool {
    module.strip_prefix(room).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}
