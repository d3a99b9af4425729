//! A file's text to JSON objects, each with the line it starts at.

use std::path::Path;

use serde_json::Value;

/// One object of a file.
#[derive(Debug)]
pub struct Document {
    /// Line its document starts at, from 1.
    pub line: usize,
    /// The object. Lists are taken apart.
    pub value: Value,
}

/// A document that does not parse.
#[derive(Debug, PartialEq, Eq)]
pub struct Broken {
    /// Line of the mistake, from 1.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

/// The objects of a file, and its documents that do not parse.
pub fn parse(path: &Path, text: &str) -> (Vec<Document>, Vec<Broken>) {
    let mut documents = Vec::new();
    let mut broken = Vec::new();
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
        let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        loop {
            let start = text.get(..values.byte_offset()).map_or(0, |before| before.matches('\n').count());
            match values.next() {
                None => break,
                Some(Ok(value)) => flatten(value, start + 1, &mut documents),
                Some(Err(error)) => {
                    broken.push(Broken { line: error.line().max(1), message: error.to_string() });
                    break;
                }
            }
        }
    } else {
        for (line, document) in yaml_documents(text) {
            match serde_saphyr::from_str_with_options::<Value>(document, yaml_options()) {
                Ok(value) => flatten(value, line, &mut documents),
                Err(error) => {
                    let inner = error.location().map_or(1, |at| usize::try_from(at.line()).unwrap_or(1));
                    let message = error.to_string();
                    // The parser draws the place over several lines; the first one says it.
                    let message = message.lines().next().unwrap_or_default();
                    let message = message.strip_prefix("error: ").unwrap_or(message);
                    // Its line counts from the document, not from the file.
                    let message = match message.split_once(": ") {
                        Some((place, rest)) if place.starts_with("line ") => rest,
                        _ => message,
                    };
                    let message = message.to_owned();
                    broken.push(Broken { line: line + inner.saturating_sub(1), message });
                }
            }
        }
    }
    (documents, broken)
}

/// Splits at the document markers: a line `---` ends a document wherever it stands (YAML 1.2,
/// 9.1.2), so one bad document does not take the others along.
fn yaml_documents(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if marker && offset > start {
            documents.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, index + 1);
        }
        offset += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents
}

/// The default limits are for configuration files; a folder may hold a whole cluster's List.
fn yaml_options() -> serde_saphyr::Options {
    let mut options = serde_saphyr::Options::default();
    if let Some(budget) = &mut options.budget {
        budget.max_events = 50_000_000;
        budget.max_nodes = 20_000_000;
        budget.max_total_scalar_bytes = 1 << 30;
    }
    options
}

fn flatten(value: Value, line: usize, documents: &mut Vec<Document>) {
    let Value::Object(mut map) = value else {
        // An empty document is nothing; a bare scalar is told apart by its missing kind.
        if !value.is_null() {
            documents.push(Document { line, value });
        }
        return;
    };
    let list = map.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
    match map.get_mut("items") {
        Some(Value::Array(items)) if list => {
            for item in std::mem::take(items) {
                flatten(item, line, documents);
            }
        }
        _ => documents.push(Document { line, value: Value::Object(map) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(documents: &[Document]) -> Vec<(usize, &str)> {
        documents.iter().map(|d| (d.line, d.value["metadata"]["name"].as_str().unwrap_or("-"))).collect()
    }

    #[test]
    fn reads_documents_lists_and_comments() {
        let text = "# head\n---\nkind: A\nmetadata: {name: one}\n---\n# nothing\n---\nkind: List\nitems:\n\
                    - metadata: {name: two}\n- metadata: {name: three}\n--- \nkind: B\nmetadata: {name: four}\n";
        let (documents, broken) = parse(Path::new("x.yaml"), text);
        assert_eq!(broken, []);
        assert_eq!(names(&documents), [(2, "one"), (7, "two"), (7, "three"), (12, "four")]);
    }

    #[test]
    fn a_broken_document_names_its_line_and_spares_the_others() {
        let text = "metadata: {name: one}\n---\na: b\nc: [\n---\nmetadata: {name: two}\n";
        let (documents, broken) = parse(Path::new("x.yml"), text);
        assert_eq!(names(&documents), [(1, "one"), (5, "two")]);
        assert_eq!(broken.len(), 1);
        assert!((2..=5).contains(&broken[0].line), "{broken:?}");
    }

    #[test]
    fn reads_json_streams() {
        let (documents, broken) = parse(
            Path::new("x.json"),
            "{\"metadata\":{\"name\":\"one\"}}\n{\"metadata\":{\"name\":\"two\"}}\n{,",
        );
        assert_eq!(names(&documents), [(1, "one"), (1, "two")]);
        assert_eq!((broken.len(), broken[0].line), (1, 3));
    }

    #[test]
    fn hostile_yaml_ends() {
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                    d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n\
                    g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g,*g]\n";
        let (_, broken) = parse(Path::new("x.yaml"), bomb);
        assert_eq!(broken.len(), 1);
        let (_, broken) = parse(Path::new("x.yaml"), &"[".repeat(100_000));
        assert_eq!(broken.len(), 1);
    }
}
