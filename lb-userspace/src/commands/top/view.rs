//! What is looked at, and what keys do to it.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::picture::{BackendRow, Picture, ServiceRow};
use crate::args::Sort;

/// Whether a key ends the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Stay,
    Quit,
}

/// What is shown of a picture.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) sort: Sort,
    /// Part of a namespace and name.
    pub(super) filter: String,
    /// Whether keys are letters of the filter.
    pub(super) is_typing: bool,
    pub(super) is_paused: bool,
    pub(super) is_help: bool,
    /// Whose backends are shown, if any's, by number of the Service.
    pub(super) opened: Option<u32>,
    /// The Service that is marked: it stays so when others overtake it. The first
    /// one if none is.
    marked: Option<u32>,
    /// Backends that are above the first one shown.
    scrolled: usize,
    /// Rows that had room when it was drawn last, for keys that turn pages.
    pub(super) room: usize,
}

impl View {
    pub(super) const fn new(sort: Sort) -> Self {
        Self {
            sort,
            filter: String::new(),
            is_typing: false,
            is_paused: false,
            is_help: false,
            opened: None,
            marked: None,
            scrolled: 0,
            room: 1,
        }
    }

    /// The Services that the filter leaves.
    pub(super) fn services<'a>(&self, picture: &'a Picture) -> Vec<&'a ServiceRow> {
        let wanted = self.filter.to_lowercase();
        let rows = picture.services.iter();
        rows.filter(|row| wanted.is_empty() || row.port.to_string().contains(&wanted))
            .collect()
    }

    /// The Service whose backends are shown; `None` also if it has gone.
    pub(super) fn opened<'a>(&self, picture: &'a Picture) -> Option<&'a ServiceRow> {
        let opened = self.opened?;
        picture.services.iter().find(|row| row.id == opened)
    }

    /// Where the mark is among the Services that are left.
    pub(super) fn position(&self, services: &[&ServiceRow]) -> usize {
        let marked = self.marked;
        let found = services.iter().position(|row| Some(row.id) == marked);
        found.unwrap_or(0)
    }

    /// The backends that are shown, of which so many have room.
    pub(super) fn backends<'a>(&self, service: &'a ServiceRow) -> &'a [BackendRow] {
        let first = self.scrolled.min(service.backends.len().saturating_sub(1));
        &service.backends[first..]
    }

    pub(super) fn key(&mut self, key: KeyEvent, picture: &Picture) -> Next {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Next::Quit,
                _ => Next::Stay,
            };
        }
        if self.is_typing {
            self.type_key(key.code);
            return Next::Stay;
        }
        match key.code {
            KeyCode::Char('q') => return Next::Quit,
            KeyCode::Esc => return self.back(),
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.is_help = !self.is_help,
            KeyCode::Char('s') => self.sort = following(self.sort),
            KeyCode::Char('p' | ' ') => self.is_paused = !self.is_paused,
            KeyCode::Char('/') => {
                self.is_help = false;
                self.opened = None;
                self.is_typing = true;
            }
            KeyCode::Enter | KeyCode::Right | KeyCode::Char('l') => self.open(picture),
            KeyCode::Left | KeyCode::Backspace => {
                if self.opened.is_some() || self.is_help {
                    self.back();
                }
            }
            code => self.step(code, picture),
        }
        Next::Stay
    }

    fn type_key(&mut self, key: KeyCode) {
        match key {
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(letter) => self.filter.push(letter),
            _ => {}
        }
        self.marked = None;
    }

    /// Out of what one is in.
    fn back(&mut self) -> Next {
        if self.is_help {
            self.is_help = false;
        } else if self.opened.is_some() {
            self.opened = None;
        } else if !self.filter.is_empty() {
            self.filter.clear();
        } else {
            return Next::Quit;
        }
        Next::Stay
    }

    fn open(&mut self, picture: &Picture) {
        if self.is_help || self.opened.is_some() {
            return;
        }
        let services = self.services(picture);
        let row = services.get(self.position(&services));
        self.opened = row.map(|row| row.id);
        self.marked = self.opened;
        self.scrolled = 0;
    }

    fn step(&mut self, key: KeyCode, picture: &Picture) {
        let page = self.room.max(1);
        let moved = |from: usize, last: usize| match key {
            KeyCode::Up | KeyCode::Char('k') => from.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => (from + 1).min(last),
            KeyCode::PageUp => from.saturating_sub(page),
            KeyCode::PageDown => (from + page).min(last),
            KeyCode::Home | KeyCode::Char('g') => 0,
            KeyCode::End | KeyCode::Char('G') => last,
            _ => from,
        };
        if let Some(service) = self.opened(picture) {
            // As far as is needed to see the last one.
            let last = service.backends.len().saturating_sub(page);
            self.scrolled = moved(self.scrolled.min(last), last);
            return;
        }
        let services = self.services(picture);
        let position = self.position(&services);
        let next = moved(position, services.len().saturating_sub(1));
        if next != position {
            self.marked = services.get(next).map(|row| row.id);
        }
    }
}

const fn following(sort: Sort) -> Sort {
    match sort {
        Sort::Connections => Sort::Packets,
        Sort::Packets => Sort::Bytes,
        Sort::Bytes => Sort::Flows,
        Sort::Flows => Sort::Connections,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::top::draw::tests::picture;

    fn key(code: KeyCode) -> KeyEvent {
        KeyEvent::new(code, KeyModifiers::NONE)
    }

    /// A view after these keys; the last one may end it.
    fn after(keys: &[KeyCode]) -> (View, Next) {
        let mut picture = picture();
        picture.sort(Sort::Connections);
        let mut view = View::new(Sort::Connections);
        let mut next = Next::Stay;
        for code in keys {
            assert_eq!(next, Next::Stay);
            next = view.key(key(*code), &picture);
        }
        (view, next)
    }

    fn marked(view: &View) -> String {
        let mut picture = picture();
        picture.sort(view.sort);
        let services = view.services(&picture);
        services[view.position(&services)].port.name.clone()
    }

    use KeyCode::{Backspace, Char, Down, End, Enter, Esc, Home, PageDown, Up};

    #[test]
    fn the_mark_moves_and_stays_on_its_service() {
        for (keys, name) in [
            (&[][..], "web"),
            (&[Down], "dns"),
            (&[Char('j'), Char('j')], "idle"),
            (&[Down, Up, Up], "web"),
            (&[End, Down], "idle"),
            (&[End, Home], "web"),
            (&[PageDown, Char('k')], "web"),
        ] {
            assert_eq!(marked(&after(keys).0), name, "{keys:?}");
        }
        // By packets another one is first.
        let (view, _) = after(&[Down, Char('s')]);
        assert_eq!((view.sort, marked(&view).as_str()), (Sort::Packets, "dns"));
    }

    #[test]
    fn enter_opens_and_escape_leads_out_step_by_step() {
        let (view, _) = after(&[Down, Enter]);
        assert_eq!(view.opened, Some(2));
        let (view, next) = after(&[Down, Enter, Char('?'), Esc]);
        assert_eq!(
            (view.opened, view.is_help, next),
            (Some(2), false, Next::Stay)
        );
        let (view, next) = after(&[Down, Enter, Esc]);
        assert_eq!((view.opened, next), (None, Next::Stay));
        assert_eq!(marked(&view), "dns");
        assert_eq!(after(&[Down, Enter, Esc, Esc]).1, Next::Quit);
        assert_eq!(after(&[Enter, Char('q')]).1, Next::Quit);
    }

    #[test]
    fn a_filter_is_typed_and_letters_of_it_are_no_commands() {
        let (view, _) = after(&[Char('/'), Char('q'), Backspace, Char('d'), Char('n'), Enter]);
        assert_eq!((view.filter.as_str(), view.is_typing), ("dn", false));
        assert_eq!(marked(&view), "dns");
        let (view, next) = after(&[Char('/'), Char('d'), Enter, Esc]);
        assert_eq!((view.filter.as_str(), next), ("", Next::Stay));
        let (view, _) = after(&[Char('/'), Char('d'), Esc]);
        assert_eq!((view.filter.as_str(), view.is_typing), ("", false));
        // Nobody is left to be opened.
        let (view, _) = after(&[Char('/'), Char('~'), Enter, Enter, Down]);
        assert_eq!(view.opened, None);
    }

    #[test]
    fn control_c_ends_it_whatever_is_going_on() {
        let interrupt = KeyEvent::new(Char('c'), KeyModifiers::CONTROL);
        let (mut view, _) = after(&[Char('/'), Char('d')]);
        assert_eq!(view.key(interrupt, &picture()), Next::Quit);
        assert_eq!(view.filter, "d");
    }

    #[test]
    fn backends_scroll_as_far_as_there_are_any() {
        let (mut view, _) = after(&[Enter]);
        view.room = 2;
        let picture = picture();
        let service = view.opened(&picture).expect("opened").clone();
        let mut seen = |code| {
            view.key(key(code), &picture);
            view.backends(&service).len()
        };
        assert_eq!(
            [Down, Down, Down, Up, End, Home].map(&mut seen),
            [2, 2, 2, 3, 2, 3]
        );
    }

    #[test]
    fn a_service_that_has_gone_is_not_opened() {
        let (view, _) = after(&[Enter]);
        let mut picture = picture();
        picture.services.clear();
        assert!(view.opened(&picture).is_none());
        assert_eq!(view.position(&view.services(&picture)), 0);
    }
}
