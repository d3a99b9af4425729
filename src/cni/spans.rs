//! Where values stand in a JSON text, so that one of them can be taken out or put in while every
//! other byte stays as its owner wrote it: order of keys, numbers, white space.
//!
//! Only for text that `serde_json` has accepted; on other text the spans mean nothing, but nothing
//! panics. (`serde_json`'s own raw values would do, but switch a feature for the whole workspace.)

use std::ops::Range;

/// A member of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The key, quotes included.
    pub key: Range<usize>,
    /// The value.
    pub value: Range<usize>,
}

/// The members of the object that begins at or after `start`; `None` when there is no object.
pub fn members(text: &str, start: usize) -> Option<Vec<Member>> {
    let bytes = text.as_bytes();
    let mut at = enter(bytes, start, b'{')?;
    let mut members = Vec::new();
    while *bytes.get(at)? != b'}' {
        let key = at..value_end(bytes, at)?;
        at = skip_blank(bytes, key.end);
        if *bytes.get(at)? != b':' {
            return None;
        }
        at = skip_blank(bytes, at + 1);
        let value = at..value_end(bytes, at)?;
        at = next(bytes, value.end)?;
        members.push(Member { key, value });
    }
    Some(members)
}

/// The elements of the array that begins at or after `start`; `None` when there is no array.
pub fn elements(text: &str, start: usize) -> Option<Vec<Range<usize>>> {
    let bytes = text.as_bytes();
    let mut at = enter(bytes, start, b'[')?;
    let mut elements = Vec::new();
    while *bytes.get(at)? != b']' {
        let value = at..value_end(bytes, at)?;
        at = next(bytes, value.end)?;
        elements.push(value);
    }
    Some(elements)
}

/// The value of a key of the object at `start`. Written twice, the last one counts, as it does for
/// the JSON of Go and for `serde_json`.
pub fn member(text: &str, start: usize, key: &str) -> Option<Member> {
    let is_key = |member: &Member| {
        text.get(member.key.clone())
            .and_then(|quoted| serde_json::from_str::<String>(quoted).ok())
            .is_some_and(|found| found == key)
    };
    members(text, start)?.into_iter().rfind(is_key)
}

fn enter(bytes: &[u8], start: usize, open: u8) -> Option<usize> {
    let at = skip_blank(bytes, start);
    (*bytes.get(at)? == open).then(|| skip_blank(bytes, at + 1))
}

/// Behind a value: the next one's start, or the closing bracket.
fn next(bytes: &[u8], end: usize) -> Option<usize> {
    let at = skip_blank(bytes, end);
    match bytes.get(at)? {
        b',' => Some(skip_blank(bytes, at + 1)),
        b'}' | b']' => Some(at),
        _ => None,
    }
}

fn skip_blank(bytes: &[u8], start: usize) -> usize {
    let rest = bytes.get(start..).unwrap_or_default();
    start + rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count()
}

fn value_end(bytes: &[u8], start: usize) -> Option<usize> {
    match bytes.get(start)? {
        b'"' => string_end(bytes, start),
        b'{' | b'[' => {
            let (mut depth, mut at) = (0_usize, start);
            loop {
                match bytes.get(at)? {
                    b'"' => {
                        at = string_end(bytes, at)?;
                        continue;
                    }
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth -= 1,
                    _ => {}
                }
                at += 1;
                if depth == 0 {
                    return Some(at);
                }
            }
        }
        _ => {
            let rest = bytes.get(start..)?;
            let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b':' | b' ' | b'\t' | b'\n' | b'\r');
            let length = rest.iter().position(ends).unwrap_or(rest.len());
            // Nothing at all is no value; taking it for one would never advance.
            (length > 0).then_some(start + length)
        }
    }
}

fn string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match bytes.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn values_stand_where_they_are() {
        let text = " {\"a\" : [1 , \"]\\\"\", {\"b\":[]}] ,\n\"c\":null,\"\\u0061\":-1.5e3}";
        let all: Vec<_> =
            members(text, 0).unwrap().into_iter().map(|m| (&text[m.key], &text[m.value])).collect();
        assert_eq!(
            all,
            [("\"a\"", "[1 , \"]\\\"\", {\"b\":[]}]"), ("\"c\"", "null"), ("\"\\u0061\"", "-1.5e3")]
        );
        let list = members(text, 0).unwrap()[0].value.start;
        let items: Vec<_> = elements(text, list).unwrap().into_iter().map(|span| &text[span]).collect();
        assert_eq!(items, ["1", "\"]\\\"\"", "{\"b\":[]}"]);
        // The last of two equal keys, however written.
        assert_eq!(&text[member(text, 0, "a").unwrap().value], "-1.5e3");
        assert_eq!(member(text, 0, "z"), None);
        assert_eq!((members("{}", 0), elements("[ ]", 0)), (Some(vec![]), Some(vec![])));
        assert_eq!((members("[]", 0), elements("7", 0), members("", 0)), (None, None, None));
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[a-c\"\\\\]{0,3}", inner, 0..5).prop_map(Value::from_iter),
            ]
        })
    }

    proptest! {
        #[test]
        fn spans_agree_with_the_parser(value in json(), pretty: bool) {
            let text = if pretty {
                serde_json::to_string_pretty(&value).unwrap()
            } else {
                value.to_string()
            };
            match &value {
                Value::Object(map) => {
                    let found = members(&text, 0).unwrap();
                    prop_assert_eq!(found.len(), map.len());
                    for Member { key, value } in found {
                        let key: String = serde_json::from_str(&text[key]).unwrap();
                        prop_assert_eq!(&serde_json::from_str::<Value>(&text[value]).unwrap(), &map[&key]);
                    }
                }
                Value::Array(list) => {
                    let found: Vec<Value> = elements(&text, 0)
                        .unwrap()
                        .into_iter()
                        .map(|span| serde_json::from_str(&text[span]).unwrap())
                        .collect();
                    prop_assert_eq!(&found, list);
                }
                _ => prop_assert_eq!((members(&text, 0), elements(&text, 0)), (None, None)),
            }
        }

        #[test]
        fn nonsense_ends_without_panic(text in "[{}\\[\\],:\"\\\\a ]{0,40}", start in 0..50_usize) {
            let _ = (members(&text, start), elements(&text, start), member(&text, start, "a"));
        }
    }
}
