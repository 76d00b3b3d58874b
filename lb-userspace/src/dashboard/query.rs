//! What stands behind the question mark of a request.

use std::{collections::BTreeMap, str::FromStr};

use super::Refusal;

/// Parameters by name, until they are taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    /// # Errors
    ///
    /// If something is given twice: nobody knows which is meant.
    pub(super) fn parse(text: &str) -> Result<Self, Refusal> {
        let mut parameters = BTreeMap::new();
        for (name, value) in form_urlencoded::parse(text.as_bytes()) {
            let name = name.into_owned();
            if parameters.contains_key(&name) {
                return Err(Refusal::wrong(format!("{name} is given twice")));
            }
            parameters.insert(name, value.into_owned());
        }
        Ok(Self(parameters))
    }

    /// One that may be missing; nothing is as good as that.
    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        self.0.remove(name).filter(|value| !value.is_empty())
    }

    /// One without which there is no answer.
    pub(super) fn needed(&mut self, name: &str) -> Result<String, Refusal> {
        let value = self.text(name);
        value.ok_or_else(|| Refusal::wrong(format!("{name} is missing")))
    }

    /// One of a certain form, which `wanted` describes.
    pub(super) fn of_form<T: FromStr>(
        &mut self,
        name: &str,
        wanted: &str,
    ) -> Result<Option<T>, Refusal> {
        let value = self.text(name).map(|value| value.parse());
        value
            .transpose()
            .map_err(|_unreadable| Refusal::wrong(format!("{name}: wanted is {wanted}")))
    }

    /// One of some words.
    pub(super) fn one_of<T: Copy>(
        &mut self,
        name: &str,
        words: &[(&str, T)],
    ) -> Result<Option<T>, Refusal> {
        let Some(value) = self.text(name) else {
            return Ok(None);
        };
        if let Some((_, meant)) = words.iter().find(|(word, _)| *word == value) {
            return Ok(Some(*meant));
        }
        let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        let words = words.join(", ");
        Err(Refusal::wrong(format!("{name}: wanted is one of {words}")))
    }

    /// # Errors
    ///
    /// If something is left that nobody has taken.
    pub(super) fn end(self) -> Result<(), Refusal> {
        match self.0.into_keys().next() {
            Some(name) => Err(Refusal::wrong(format!("there is no parameter {name}"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Query {
        Query::parse(text).expect("parameters")
    }

    #[test]
    fn parameters_are_taken_once_each_and_decoded() {
        let mut query = query("a=x+y%2Fz&b=&c=7&d=%5Bfd00%3A%3A1%5D%3A80");
        assert_eq!(query.text("a").as_deref(), Some("x y/z"));
        assert_eq!(query.text("a"), None);
        assert_eq!(query.text("b"), None, "nothing is none");
        assert_eq!(query.of_form("c", "a number"), Ok(Some(7)));
        assert_eq!(query.needed("d").as_deref(), Ok("[fd00::1]:80"));
        assert_eq!(query.end(), Ok(()));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_a_sentence() {
        let sentence = |refusal: Refusal| refusal.sentence;
        let twice = Query::parse("a=1&a=2").map_err(sentence);
        assert_eq!(twice, Err("a is given twice".to_owned()));
        let missing = query("").needed("a").map_err(sentence);
        assert_eq!(missing, Err("a is missing".to_owned()));
        let form = query("a=x").of_form::<u16>("a", "a port").map_err(sentence);
        assert_eq!(form, Err("a: wanted is a port".to_owned()));
        let word = query("a=x").one_of("a", &[("y", 1), ("z", 2)]);
        let word = word.map_err(sentence);
        assert_eq!(word, Err("a: wanted is one of y, z".to_owned()));
        let left = query("a=x").end().map_err(sentence);
        assert_eq!(left, Err("there is no parameter a".to_owned()));
    }
}
