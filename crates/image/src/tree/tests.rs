//! The merge against a model that follows the specification's words: in each layer all whiteouts first, on what is
//! below, and then the entries one by one.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

type Path = Vec<u8>;

/// What the model knows of a file: a directory's mode, or a file's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Directory(u16),
    File(u64),
}

#[derive(Clone, Debug)]
enum Op {
    File(Path, u64),
    Directory(Path, u16),
    Whiteout(Path),
    Opaque(Path),
}

fn path() -> impl Strategy<Value = Path> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|parts| parts.join("/").into_bytes())
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (path(), 0..1000u64).prop_map(|(path, id)| Op::File(path, id)),
        2 => (path(), 0..0o1000u16).prop_map(|(path, mode)| Op::Directory(path, mode)),
        2 => path().prop_map(Op::Whiteout),
        1 => path().prop_map(Op::Opaque),
    ]
}

type Model = BTreeMap<Path, Seen>;

fn remove_below(model: &mut Model, path: &[u8]) {
    let prefix = [path, b"/"].concat();
    model.retain(|known, _| !known.starts_with(&prefix));
}

/// Applies a layer; `None` if it puts something below a file.
fn apply_to_model(model: &mut Model, layer: &[Op]) -> Option<()> {
    for op in layer {
        match op {
            Op::Whiteout(path) => {
                remove_below(model, path);
                model.remove(path);
            }
            Op::Opaque(path) => remove_below(model, path),
            _ => {}
        }
    }
    for op in layer {
        let (path, seen) = match op {
            Op::File(path, id) => (path, Seen::File(*id)),
            Op::Directory(path, mode) => (path, Seen::Directory(*mode)),
            _ => continue,
        };
        for (i, _) in path.iter().enumerate().filter(|(_, b)| **b == b'/') {
            if let Seen::File(_) = model.entry(path[..i].to_vec()).or_insert(Seen::Directory(0o755)) {
                return None;
            }
        }
        let keeps_content = matches!((model.get(path), seen), (Some(Seen::Directory(_)), Seen::Directory(_)));
        if !keeps_content {
            remove_below(model, path);
        }
        model.insert(path.clone(), seen);
    }
    Some(())
}

fn apply_to_tree(tree: &mut Tree, layer: &[Op]) -> Result<()> {
    for op in layer {
        match op {
            Op::File(path, id) => {
                tree.insert(
                    path,
                    Metadata::default(),
                    NewNode::File(Content { size: *id, ..Content::default() }),
                )?;
            }
            Op::Directory(path, mode) => {
                tree.insert(path, Metadata { mode: *mode, ..Metadata::default() }, NewNode::Directory)?;
            }
            Op::Whiteout(path) => tree.whiteout(path)?,
            Op::Opaque(path) => tree.opaque(path)?,
        }
    }
    tree.next_layer();
    Ok(())
}

fn flatten(tree: &Tree) -> Model {
    let mut model = Model::new();
    let mut pending = vec![(ROOT, Path::new())];
    while let Some((id, path)) = pending.pop() {
        let Some(directory) = tree.directory(id) else { continue };
        for (name, dentry) in &directory.entries {
            let path = if path.is_empty() { name.to_vec() } else { [&path[..], b"/", name].concat() };
            let inode = tree.inode(dentry.inode);
            let seen = match &inode.node {
                Node::File(content) => Seen::File(content.size),
                _ => Seen::Directory(inode.metadata.mode),
            };
            model.insert(path.clone(), seen);
            pending.push((dentry.inode, path));
        }
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn merges_as_the_specification_says(layers in prop::collection::vec(prop::collection::vec(op(), 0..8), 1..4)) {
        let mut tree = Tree::new(&Limits::default());
        let mut model = Model::new();
        let mut files = 0;
        for layer in &layers {
            files += layer.iter().filter(|op| matches!(op, Op::File(..))).count();
            let expected = apply_to_model(&mut model, layer);
            let actual = apply_to_tree(&mut tree, layer);
            if actual.is_err() {
                // Entries that stand before the whiteout that makes room for them are refused; the model waits for it.
                prop_assert!(expected.is_none() || layer.iter().any(|op| matches!(op, Op::Whiteout(_) | Op::Opaque(_))));
                return Ok(());
            }
            prop_assert!(expected.is_some());
            prop_assert_eq!(&flatten(&tree), &model);
        }
        // Every file that was written is either in the tree or given back.
        let live = model.values().filter(|seen| matches!(seen, Seen::File(_))).count();
        prop_assert_eq!(live + tree.take_dropped().len(), files);
    }
}

fn file(size: u64) -> NewNode {
    NewNode::File(Content { size, ..Content::default() })
}

#[test]
fn links_lead_through_the_tree_and_never_out_of_it() {
    let mut tree = Tree::new(&Limits::default());
    let link = |target: &str| NewNode::Symlink(target.as_bytes().into());
    tree.insert(b"up", Metadata::default(), link("../../../x/../y")).unwrap();
    tree.insert(b"d/absolute", Metadata::default(), link("/y")).unwrap();
    tree.insert(b"up/one", Metadata::default(), file(1)).unwrap();
    tree.insert(b"d/absolute/two", Metadata::default(), file(2)).unwrap();
    let seen = flatten(&tree);
    assert_eq!(seen[&b"y/one"[..]], Seen::File(1));
    assert_eq!(seen[&b"y/two"[..]], Seen::File(2));
}

#[test]
fn the_last_of_equal_names_wins() {
    let mut tree = Tree::new(&Limits::default());
    for size in 1..4 {
        tree.insert(b"a", Metadata::default(), file(size)).unwrap();
    }
    assert_eq!(flatten(&tree)[&b"a"[..]], Seen::File(3));
    assert_eq!(tree.take_dropped().len(), 2);
}

#[test]
fn a_hard_link_outlives_its_first_name() {
    let mut tree = Tree::new(&Limits::default());
    tree.insert(b"dir/file", Metadata::default(), file(7)).unwrap();
    tree.next_layer();
    // The new name takes the place of the directory that the target is in.
    tree.hard_link(b"dir", b"dir/file").unwrap();
    assert_eq!(flatten(&tree), Model::from([(b"dir".to_vec(), Seen::File(7))]));
    tree.hard_link(b"dir", b"dir").unwrap();
    assert!(tree.take_dropped().is_empty());
    tree.next_layer();
    tree.whiteout(b"dir").unwrap();
    assert_eq!(tree.take_dropped().len(), 1);
}
