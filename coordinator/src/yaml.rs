//! YAML as a tree whose scalars know their line and whether they were quoted: what they mean is the reader's to say.

use yaml_rust2::parser::{Event, MarkedEventReceiver, Parser};
use yaml_rust2::scanner::{Marker, TScalarStyle};

/// Nodes of one file, those that aliases repeat among them.
const MOST: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub line: usize,
    pub content: Content,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Its text, and whether it stood there plainly: only then `null`, `true` and `1` are no strings.
    Scalar(String, bool),
    List(Vec<Node>),
    /// In the order of the file.
    Map(Vec<(String, Node)>),
}

impl Node {
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|(known, _)| known == key).map(|(_, node)| node),
            _ => None,
        }
    }

    pub fn is_null(&self) -> bool {
        matches!(&self.content, Content::Scalar(text, true) if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// Its text, null being none.
    pub fn text(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar(text, _) if !self.is_null() => Some(text),
            _ => None,
        }
    }

    pub fn list(&self) -> &[Node] {
        match &self.content {
            Content::List(items) => items,
            _ => &[],
        }
    }

    pub fn entries(&self) -> &[(String, Node)] {
        match &self.content {
            Content::Map(entries) => entries,
            _ => &[],
        }
    }
}

/// The first document of `text`; an error is the problem with its line.
pub fn parse(text: &str) -> Result<Node, String> {
    let mut builder = Builder::default();
    let mut parser = Parser::new_from_str(text);
    parser.load(&mut builder, false).map_err(|error| format!("is not valid YAML ({error})"))?;
    match (builder.problem, builder.root) {
        (Some(problem), _) => Err(problem),
        (None, Some(root)) => Ok(root),
        (None, None) => Err("is empty".into()),
    }
}

#[derive(Default)]
struct Builder {
    /// Lists and maps that are open, with their anchor and the key that waits for its value.
    open: Vec<(Node, usize, Option<String>)>,
    anchors: Vec<(usize, Node, usize)>,
    root: Option<Node>,
    nodes: usize,
    problem: Option<String>,
}

impl Builder {
    fn put(&mut self, node: Node, anchor: usize) {
        if anchor > 0 {
            let size = size(&node);
            self.anchors.push((anchor, node.clone(), size));
        }
        let Some((parent, _, key)) = self.open.last_mut() else {
            self.root = Some(node);
            return;
        };
        match (&mut parent.content, key.take()) {
            (Content::List(items), _) => items.push(node),
            (Content::Map(entries), Some(name)) if name == "<<" => {
                let merged = if let Content::List(all) = node.content { all } else { vec![node] };
                for (name, value) in merged.iter().flat_map(|node| node.entries()) {
                    if !entries.iter().any(|(known, _)| known == name) {
                        entries.push((name.clone(), value.clone()));
                    }
                }
            }
            (Content::Map(entries), Some(name)) => match entries.iter_mut().find(|(known, _)| *known == name) {
                // The later one counts, as in Python.
                Some((_, old)) => *old = node,
                None => entries.push((name, node)),
            },
            (Content::Map(_), None) => match node.content {
                Content::Scalar(text, _) => *key = Some(text),
                _ => self.problem = Some(format!("line {}: a key must be a string", node.line)),
            },
            (Content::Scalar(..), _) => (),
        }
    }
}

fn size(node: &Node) -> usize {
    1 + match &node.content {
        Content::Scalar(..) => 0,
        Content::List(items) => items.iter().map(size).sum::<usize>(),
        Content::Map(entries) => entries.iter().map(|(_, node)| size(node)).sum(),
    }
}

impl MarkedEventReceiver for Builder {
    fn on_event(&mut self, event: Event, mark: Marker) {
        if self.problem.is_some() {
            return;
        }
        let line = mark.line();
        self.nodes += 1;
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == TScalarStyle::Plain;
                self.put(Node { line, content: Content::Scalar(text, plain) }, anchor);
            }
            Event::SequenceStart(anchor, _) => {
                self.open.push((Node { line, content: Content::List(Vec::new()) }, anchor, None));
            }
            Event::MappingStart(anchor, _) => {
                self.open.push((Node { line, content: Content::Map(Vec::new()) }, anchor, None));
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some((node, anchor, _)) = self.open.pop() {
                    self.put(node, anchor);
                }
            }
            Event::Alias(anchor) => match self.anchors.iter().rev().find(|(known, ..)| *known == anchor) {
                Some((_, node, size)) => {
                    self.nodes += size;
                    let node = node.clone();
                    match self.nodes > MOST {
                        true => self.problem = Some(format!("line {line}: aliases repeat too much")),
                        false => self.put(node, 0),
                    }
                }
                None => self.problem = Some(format!("line {line}: an alias has no anchor")),
            },
            _ => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_anchors_and_quotes_are_read() {
        let text = "a: &x !Thing\n  b: null\n  c: 'null'\nd:\n  <<: *x\n  c: \"1\\n\n    2\"\ne: [1, *x]\n";
        let root = parse(text).unwrap();
        assert!(root.get("a").unwrap().get("b").unwrap().is_null());
        assert_eq!(root.get("a").unwrap().get("c").unwrap().text(), Some("null"));
        assert_eq!(root.get("d").unwrap().get("c").unwrap().text(), Some("1\n 2"));
        assert!(root.get("d").unwrap().get("b").unwrap().is_null());
        assert_eq!(root.get("e").unwrap().list()[1].get("c").unwrap().line, 3);
    }

    #[test]
    fn aliases_cannot_explode() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x]\n");
        for i in 1..12 {
            let all = format!("*a{}, ", i - 1).repeat(8);
            text += &format!("a{i}: &a{i} [{}]\n", all.trim_end_matches(", "));
        }
        assert!(parse(&text).unwrap_err().contains("aliases repeat too much"));
    }
}
