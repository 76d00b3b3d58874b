//! A picture on a terminal of any size.

use ratatui::{
    Frame,
    buffer::Buffer,
    layout::Rect,
    style::{Color, Modifier, Style},
    text::{Line, Span},
};

use super::{
    figures::{bar, percent, short},
    picture::{BackendRow, Picture, Rates, ServiceRow},
    view::View,
};
use crate::{args::Sort, commands::status::counters::shown};

/// Columns of a bar.
const BAR: usize = 6;
/// What a name has at least, if there is anything beside it.
const NARROWEST_NAME: usize = 16;
/// The weight of the column by which rows are sorted.
const SORTED: u8 = 8;
/// What keys do, the most important first: what has no room is left out.
const KEYS: [(&str, &str); 7] = [
    ("q", "quit"),
    ("?", "help"),
    ("↑↓", "move"),
    ("Enter", "backends"),
    ("s", "sort"),
    ("/", "filter"),
    ("p", "pause"),
];
const KEYS_OF_BACKENDS: [(&str, &str); 6] = [
    ("q", "quit"),
    ("?", "help"),
    ("Esc", "back"),
    ("↑↓", "scroll"),
    ("s", "sort"),
    ("p", "pause"),
];
const KEYS_OF_FILTER: [(&str, &str); 2] = [("Enter", "done"), ("Esc", "all again")];

/// What keys and columns mean.
const HELP: [(&str, &str); 15] = [
    ("↑ ↓ j k", "move; also PgUp, PgDn, Home, End"),
    ("Enter", "the backends of the marked Service"),
    ("Esc", "back, and at last out; q and Ctrl-C end it at once"),
    ("s", "sort by the next column"),
    ("/", "only Services with these letters in their name"),
    ("p", "pause: what is there stays"),
    ("", ""),
    (
        "CONN/S",
        "connections and exchanges begun, by packets and at sockets",
    ),
    (
        "PKT/S BYTE/S",
        "both ways, without what was translated at a socket: its packets meet no program",
    ),
    (
        "FLOWS",
        "that packets are translated by, those included that have just ended",
    ),
    ("SHARE", "of that by which rows are sorted"),
    (
        "RESET",
        "flows that were reset just now: by a port that refuses, or a backend that gives up",
    ),
    ("SILENT", "flows that have waited for an answer for seconds"),
    (
        "refused",
        "packets and calls of the whole node that end here, by reason; `klb status` says what each means",
    ),
    (
        "of others",
        "what flows through backends that have gone, or have no counters",
    ),
];
/// Columns of what is explained.
const HELP_TERM: usize = 14;

/// How a terminal shows what matters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Theme {
    good: Style,
    bad: Style,
    title: Style,
    header: Style,
    marked: Style,
    sorted: Style,
}

impl Theme {
    /// Without colours, what is marked is still seen.
    pub(super) fn new(has_colours: bool) -> Self {
        let colour = |colour| {
            if has_colours {
                Style::new().fg(colour)
            } else {
                Style::new()
            }
        };
        Self {
            good: colour(Color::Green),
            bad: colour(Color::Red),
            title: Style::new().add_modifier(Modifier::BOLD),
            header: colour(Color::Cyan),
            marked: Style::new().add_modifier(Modifier::REVERSED),
            sorted: Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED),
        }
    }
}

/// What is drawn.
pub(super) struct Scene<'a> {
    /// `None` before the second reading.
    pub(super) picture: Option<&'a Picture>,
    /// Why there is no newer one.
    pub(super) trouble: Option<&'a str>,
    /// How often there is one.
    pub(super) interval: &'a str,
    pub(super) theme: Theme,
}

/// A column beside the name.
struct Column<R> {
    header: &'static str,
    width: usize,
    /// Whether rows may be sorted by it.
    sort: Option<Sort>,
    /// Those of less are left out first where there is no room for all.
    weight: u8,
    cell: fn(&R) -> String,
    /// Whether what a cell says is bad.
    is_bad: fn(&R) -> bool,
}

const fn never<R>(_: &R) -> bool {
    false
}

const SERVICE_COLUMNS: [Column<ServiceRow>; 5] = [
    Column {
        header: "BACKENDS",
        width: 8,
        sort: None,
        weight: 1,
        cell: |row| row.backends.len().to_string(),
        is_bad: |row| row.backends.is_empty(),
    },
    Column {
        header: "CONN/S",
        width: 6,
        sort: Some(Sort::Connections),
        weight: 5,
        cell: |row| short(row.per_second.connections),
        is_bad: never,
    },
    Column {
        header: "PKT/S",
        width: 5,
        sort: Some(Sort::Packets),
        weight: 2,
        cell: |row| short(row.per_second.packets()),
        is_bad: never,
    },
    Column {
        header: "BYTE/S",
        width: 6,
        sort: Some(Sort::Bytes),
        weight: 4,
        cell: |row| short(row.per_second.bytes()),
        is_bad: never,
    },
    Column {
        header: "FLOWS",
        width: 5,
        sort: Some(Sort::Flows),
        weight: 3,
        cell: |row| count(row.flows.active),
        is_bad: never,
    },
];

const BACKEND_COLUMNS: [Column<BackendRow>; 7] = [
    Column {
        header: "SHARE",
        width: BAR + 5,
        sort: None,
        weight: 9,
        cell: |row| format!("{} {:>4}", bar(row.share, BAR), percent(row.share)),
        is_bad: never,
    },
    Column {
        header: "CONN/S",
        width: 6,
        sort: Some(Sort::Connections),
        weight: 4,
        cell: |row| rate(row, |rates| rates.connections),
        is_bad: never,
    },
    Column {
        header: "PKT/S",
        width: 5,
        sort: Some(Sort::Packets),
        weight: 1,
        cell: |row| rate(row, Rates::packets),
        is_bad: never,
    },
    Column {
        header: "BYTE/S",
        width: 6,
        sort: Some(Sort::Bytes),
        weight: 3,
        cell: |row| rate(row, Rates::bytes),
        is_bad: never,
    },
    Column {
        header: "FLOWS",
        width: 5,
        sort: Some(Sort::Flows),
        weight: 2,
        cell: |row| count(row.flows.active),
        is_bad: never,
    },
    Column {
        header: "RESET",
        width: 5,
        sort: None,
        weight: 6,
        cell: |row| count(row.flows.reset),
        is_bad: |row| row.flows.reset > 0,
    },
    Column {
        header: "SILENT",
        width: 6,
        sort: None,
        weight: 5,
        cell: |row| count(row.flows.unanswered),
        is_bad: |row| row.flows.unanswered > 0,
    },
];

#[expect(clippy::cast_precision_loss, reason = "no table has 2^53 flows")]
fn count(flows: u64) -> String {
    if flows < 10_000 {
        return flows.to_string();
    }
    short(flows as f64)
}

fn rate(row: &BackendRow, of: fn(&Rates) -> f64) -> String {
    let rates = row.per_second.as_ref();
    rates.map_or_else(|| "-".to_owned(), |rates| short(of(rates)))
}

/// Draws all of it; the view learns how many rows have room.
pub(super) fn draw(frame: &mut Frame<'_>, scene: &Scene<'_>, view: &mut View) {
    let area = frame.area();
    let width = usize::from(area.width);
    let mut lines = vec![title(scene, view), summary(scene, view, width)];
    let bottom = bottom(scene, view, width);
    let height = usize::from(area.height);
    let headers = if view.opened.is_some() { 2 } else { 1 };
    let room = height.saturating_sub(lines.len() + headers + bottom.len());
    view.room = room.max(1);
    lines.extend(body(scene, view, width, room));
    lines.truncate(height.saturating_sub(bottom.len()));
    let buffer = frame.buffer_mut();
    put(buffer, area, 0, &lines);
    let last = height.saturating_sub(bottom.len());
    put(buffer, area, last, &bottom);
}

fn put(buffer: &mut Buffer, area: Rect, from: usize, lines: &[Line<'_>]) {
    for (y, line) in (from..usize::from(area.height)).zip(lines) {
        buffer.set_line(area.x, area.y + y as u16, line, area.width);
        // What is marked is so to the end of its line.
        let rest = Rect::new(area.x, area.y + y as u16, area.width, 1);
        buffer.set_style(rest, line.style);
    }
}

fn title<'a>(scene: &Scene<'a>, view: &View) -> Line<'a> {
    let mut spans = vec![Span::styled("klb top", scene.theme.title)];
    let mut say = |text: String| spans.push(Span::raw(format!("  {text}")));
    say(format!("every {}", scene.interval));
    let sort = match view.sort {
        Sort::Connections => "connections",
        Sort::Packets => "packets",
        Sort::Bytes => "bytes",
        Sort::Flows => "flows",
    };
    say(format!("by {sort}"));
    if !view.filter.is_empty() && !view.is_typing {
        say(format!("with \"{}\"", view.filter));
    }
    if view.is_paused {
        spans.push(Span::styled("  paused", scene.theme.title));
    }
    Line::from(spans)
}

/// All Services together, or the one that is opened, as far as there is room.
fn summary<'a>(scene: &Scene<'a>, view: &View, width: usize) -> Line<'a> {
    let Some(picture) = scene.picture else {
        return Line::raw("counting …");
    };
    let opened = view.opened(picture);
    let subject = opened.map_or_else(
        || format!("{} Services", picture.services.len()),
        |row| format!("{} backends", row.backends.len()),
    );
    let of_row = opened.map(|row| (row.per_second, row.flows));
    let (rates, flows) = of_row.unwrap_or_else(|| picture.total());
    let mut parts = vec![
        subject,
        format!("{} conn/s", short(rates.connections)),
        format!("{} pkt/s", short(rates.packets())),
        format!("{} byte/s", short(rates.bytes())),
        format!("{} flows", count(flows.active)),
    ];
    let others = picture.unattributed.packets();
    if others > 0.0 && opened.is_none() {
        parts.push(format!("{} pkt/s of others", short(others)));
    }
    let mut text = String::new();
    for part in parts {
        let gap = if text.is_empty() { "" } else { "  " };
        if text.len() + gap.len() + part.len() > width {
            break;
        }
        text.push_str(gap);
        text.push_str(&part);
    }
    Line::raw(text)
}

/// The header and what is below it.
fn body<'a>(scene: &Scene<'a>, view: &View, width: usize, room: usize) -> Vec<Line<'a>> {
    if view.is_help {
        return help(width);
    }
    let Some(picture) = scene.picture else {
        return Vec::new();
    };
    match view.opened {
        None => services(scene, view, picture, width, room),
        Some(_) => backends(scene, view, picture, width),
    }
}

/// Each with as many lines as it takes.
fn help<'a>(width: usize) -> Vec<Line<'a>> {
    let room = width.saturating_sub(HELP_TERM).max(HELP_TERM);
    let mut lines = Vec::new();
    for (term, text) in HELP {
        let mut line = format!("{term:<HELP_TERM$}");
        let mut taken = 0;
        for word in text.split(' ') {
            let length = word.chars().count();
            if taken > 0 && taken + 1 + length > room {
                lines.push(Line::raw(line));
                line = " ".repeat(HELP_TERM);
                taken = 0;
            } else if taken > 0 {
                line.push(' ');
                taken += 1;
            }
            line.push_str(word);
            taken += length;
        }
        lines.push(Line::raw(line));
    }
    lines
}

fn services<'a>(
    scene: &Scene<'a>,
    view: &View,
    picture: &'a Picture,
    width: usize,
    room: usize,
) -> Vec<Line<'a>> {
    let rows = view.services(picture);
    let names: Vec<String> = rows.iter().map(|row| name(row)).collect();
    let layout = Layout::new(&SERVICE_COLUMNS, &names, view.sort, width);
    let mut lines = vec![layout.header("SERVICE", view.sort, scene.theme)];
    if rows.is_empty() {
        let filtered = !view.filter.is_empty();
        lines.push(Line::raw(if filtered { "none has that" } else { "none" }));
        return lines;
    }
    let marked = view.position(&rows);
    // The marked one is in sight, with as many before it as there can be.
    let first = (marked + 1).saturating_sub(room.max(1));
    let shown = rows.iter().zip(&names).enumerate().skip(first).take(room);
    lines.extend(shown.map(|(index, (row, name))| {
        let line = layout.line(name, row, scene.theme);
        if index == marked {
            line.style(scene.theme.marked)
        } else {
            line
        }
    }));
    lines
}

/// Two Services of one name and port may differ by the protocol.
fn name(row: &ServiceRow) -> String {
    match row.protocol.as_str() {
        "TCP" => row.port.to_string(),
        protocol => format!("{} {protocol}", row.port),
    }
}

fn backends<'a>(
    scene: &Scene<'a>,
    view: &View,
    picture: &'a Picture,
    width: usize,
) -> Vec<Line<'a>> {
    let Some(service) = view.opened(picture) else {
        return vec![Line::raw("this Service has gone")];
    };
    let all = &service.backends;
    let names: Vec<String> = all.iter().map(|row| row.addr().to_string()).collect();
    let layout = Layout::new(&BACKEND_COLUMNS, &names, view.sort, width);
    let mut lines = vec![
        Line::styled(name(service), scene.theme.title),
        layout.header("BACKEND", view.sort, scene.theme),
    ];
    if all.is_empty() {
        lines.push(Line::styled("none: nobody gets an answer", scene.theme.bad));
    }
    let rows = view.backends(service).iter();
    lines.extend(rows.map(|row| layout.line(&row.addr().to_string(), row, scene.theme)));
    lines
}

/// Which columns have room, and how wide names are.
struct Layout<'a, R> {
    columns: Vec<&'a Column<R>>,
    name: usize,
}

impl<'a, R> Layout<'a, R> {
    /// Columns are left out until names have room, or nearly so.
    fn new(columns: &'a [Column<R>], names: &[String], sort: Sort, width: usize) -> Self {
        let longest = names.iter().map(|name| name.chars().count()).max();
        let wanted = longest
            .unwrap_or(0)
            .clamp(NARROWEST_NAME, width.max(42) / 2);
        let mut columns: Vec<_> = columns.iter().collect();
        let taken = |columns: &[&Column<R>]| -> usize {
            columns.iter().map(|column| column.width + 2).sum()
        };
        // The last one stays as long as names have any room.
        let has_room = |columns: &[&Column<R>]| {
            let name = width.saturating_sub(taken(columns));
            name >= wanted || (columns.len() == 1 && name >= NARROWEST_NAME / 2)
        };
        while !has_room(&columns) {
            let weight = |column: &Column<R>| match column.sort {
                Some(by) if by == sort => SORTED,
                _ => column.weight,
            };
            let least = (0..columns.len()).min_by_key(|index| weight(columns[*index]));
            let Some(least) = least else { break };
            columns.remove(least);
        }
        let name = width.saturating_sub(taken(&columns));
        Self { columns, name }
    }

    fn header(&self, name: &str, sort: Sort, theme: Theme) -> Line<'static> {
        let mut spans = vec![Span::styled(self.padded(name), theme.header)];
        for column in &self.columns {
            let style = if column.sort == Some(sort) {
                theme.header.patch(theme.sorted)
            } else {
                theme.header
            };
            let Column { header, width, .. } = column;
            let blank = width.saturating_sub(header.len()) + 2;
            spans.push(Span::styled(" ".repeat(blank), theme.header));
            spans.push(Span::styled(*header, style));
        }
        Line::from(spans)
    }

    fn line(&self, name: &str, row: &R, theme: Theme) -> Line<'static> {
        let mut spans = vec![Span::raw(self.padded(name))];
        for column in &self.columns {
            let cell = format!("  {:>1$}", (column.cell)(row), column.width);
            let style = if (column.is_bad)(row) {
                theme.bad
            } else if column.header == "SHARE" {
                theme.good
            } else {
                Style::new()
            };
            spans.push(Span::styled(cell, style));
        }
        Line::from(spans)
    }

    /// The beginning of a name that is too long says less than its end.
    fn padded(&self, name: &str) -> String {
        let length = name.chars().count();
        if length <= self.name {
            return format!("{name:<0$}", self.name);
        }
        let kept = self.name.saturating_sub(1);
        let end = name.chars().skip(length - kept);
        ['…'].into_iter().chain(end).take(self.name).collect()
    }
}

/// What is refused, why nothing is new, and the keys.
fn bottom<'a>(scene: &Scene<'a>, view: &View, width: usize) -> Vec<Line<'a>> {
    let mut lines = Vec::new();
    if let Some(trouble) = scene.trouble {
        lines.push(Line::styled(trouble.to_owned(), scene.theme.bad));
    }
    if let Some(picture) = scene.picture {
        lines.push(refusals(picture, scene.theme));
    }
    if view.is_typing {
        lines.push(Line::raw(format!("/{}█", view.filter)));
    }
    let keys = if view.is_typing {
        &KEYS_OF_FILTER[..]
    } else if view.opened.is_some() {
        &KEYS_OF_BACKENDS[..]
    } else {
        &KEYS[..]
    };
    lines.push(footer(keys, width, scene.theme));
    lines
}

fn refusals<'a>(picture: &Picture, theme: Theme) -> Line<'a> {
    let rows = picture.refusals.iter().map(|row| {
        let rate = row.per_second.map(shown).unwrap_or_default();
        format!("{} {rate}/s", row.reason)
    });
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return Line::raw("refused: nothing");
    }
    Line::styled(format!("refused: {}", rows.join(", ")), theme.bad)
}

fn footer(keys: &[(&'static str, &'static str)], width: usize, theme: Theme) -> Line<'static> {
    let mut spans: Vec<Span<'static>> = Vec::new();
    let mut taken = 0;
    for (key, what) in keys {
        let gap = if spans.is_empty() { "" } else { "  " };
        let more = gap.len() + key.chars().count() + 1 + what.len();
        if taken + more > width {
            continue;
        }
        taken += more;
        spans.push(Span::raw(gap));
        spans.push(Span::styled(*key, theme.title));
        spans.push(Span::raw(format!(" {what}")));
    }
    Line::from(spans)
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use ratatui::{
        Terminal,
        backend::TestBackend,
        buffer::Cell,
        crossterm::event::{KeyCode, KeyEvent},
    };

    use super::*;
    use crate::commands::{
        PortId,
        status::counters,
        top::meter::FlowCount,
        top::picture::{Rates, tests::life},
    };

    fn port(namespace: &str, name: &str, port_name: &str) -> PortId {
        PortId {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            port_name: port_name.to_owned(),
        }
    }

    fn rates(connections: f64, packets: f64, bytes: f64) -> Rates {
        Rates {
            connections,
            packets_in: packets,
            packets_out: 0.0,
            bytes_in: 0.0,
            bytes_out: bytes,
        }
    }

    fn backend(id: u8, per_second: Option<Rates>, counts: [u64; 3]) -> BackendRow {
        let [active, reset, unanswered] = counts;
        BackendRow {
            life: life(id.into()),
            address: IpAddr::V4(Ipv4Addr::new(10, 244, 0, id)),
            port: 3000,
            share: 0.0,
            per_second,
            flows: FlowCount {
                active,
                reset,
                unanswered,
            },
        }
    }

    fn service(id: u32, port: PortId, per_second: Rates, backends: Vec<BackendRow>) -> ServiceRow {
        ServiceRow {
            id,
            port,
            protocol: "TCP".to_owned(),
            per_second,
            flows: FlowCount {
                active: backends.iter().map(|row| row.flows.active).sum(),
                ..FlowCount::default()
            },
            backends,
        }
    }

    /// Three Services of different kinds, in no order.
    pub(in crate::commands::top) fn picture() -> Picture {
        let web = vec![
            backend(7, None, [5, 0, 1]),
            backend(5, Some(rates(617.0, 6150.0, 2.3e6)), [170, 2, 0]),
            backend(6, Some(rates(617.0, 6195.0, 2.3e6)), [170, 0, 0]),
        ];
        let dns = vec![backend(
            9,
            Some(rates(40.0, 52_000.0, 900.0)),
            [12_345, 0, 0],
        )];
        let mut dns = service(
            2,
            port("kube-system", "dns", ""),
            rates(40.0, 52e3, 900.0),
            dns,
        );
        dns.protocol = "UDP".to_owned();
        Picture {
            services: vec![
                service(
                    3,
                    port("shop", "idle", "http"),
                    Rates::default(),
                    Vec::new(),
                ),
                dns,
                service(
                    1,
                    port("shop", "web", "http"),
                    rates(1234.0, 12_345.0, 4.6e6),
                    web,
                ),
            ],
            unattributed: Rates::default(),
            refusals: vec![counters::Row {
                hook: "tc-ingress",
                reason: "no_backend",
                effect: "answer",
                count: 99,
                per_second: Some(3.5),
                description: "The Service has no backend.",
                is_refusal: true,
            }],
        }
    }

    struct Drawing {
        view: View,
        terminal: Terminal<TestBackend>,
        picture: Option<Picture>,
        trouble: Option<&'static str>,
        has_colours: bool,
    }

    impl Drawing {
        fn new(width: u16, height: u16) -> Self {
            let terminal = Terminal::new(TestBackend::new(width, height));
            let mut picture = picture();
            picture.sort(Sort::Connections);
            Self {
                view: View::new(Sort::Connections),
                terminal: terminal.expect("memory"),
                picture: Some(picture),
                trouble: None,
                has_colours: true,
            }
        }

        fn press(&mut self, keys: &[KeyCode]) {
            for key in keys {
                let picture = self.picture.as_mut().expect("something to look at");
                self.view.key(KeyEvent::from(*key), picture);
                picture.sort(self.view.sort);
            }
        }

        fn draw(&mut self) -> &Buffer {
            let scene = Scene {
                picture: self.picture.as_ref(),
                trouble: self.trouble,
                interval: "1s",
                theme: Theme::new(self.has_colours),
            };
            let view = &mut self.view;
            let drawn = self.terminal.draw(|frame| draw(frame, &scene, view));
            drawn.expect("drawn");
            self.terminal.backend().buffer()
        }

        fn text(&mut self) -> String {
            let buffer = self.draw();
            let width = usize::from(buffer.area.width);
            let lines = buffer.content.chunks(width).map(|cells| {
                let line: String = cells.iter().map(Cell::symbol).collect();
                line.trim_end().to_owned() + "\n"
            });
            lines.collect()
        }
    }

    #[test]
    fn services_in_80_columns() {
        assert_eq!(Drawing::new(80, 10).text(), SERVICES_80);
    }

    #[test]
    fn services_in_40_columns() {
        assert_eq!(Drawing::new(40, 10).text(), SERVICES_40);
    }

    #[test]
    fn backends_in_80_columns() {
        let mut drawing = Drawing::new(80, 10);
        drawing.press(&[KeyCode::Enter]);
        assert_eq!(drawing.text(), BACKENDS_80);
    }

    #[test]
    fn backends_in_40_columns() {
        let mut drawing = Drawing::new(40, 10);
        drawing.press(&[KeyCode::Enter]);
        assert_eq!(drawing.text(), BACKENDS_40);
    }

    #[test]
    fn help_fits_a_terminal_of_the_usual_size() {
        let mut drawing = Drawing::new(80, 24);
        drawing.press(&[KeyCode::Char('?')]);
        let text = drawing.text();
        for (term, words) in HELP {
            assert!(text.contains(term), "{term} in {text}");
            let last = words.rsplit(' ').next().expect("a word");
            assert!(text.contains(last), "{last} in {text}");
        }
        assert!(text.trim_end().ends_with("p pause"), "{text}");
    }

    #[test]
    fn whatever_the_size_nothing_breaks() {
        for width in (1..=90).step_by(3) {
            for height in 1..=9 {
                let mut drawing = Drawing::new(width, height);
                drawing.trouble = Some("klb_meta: gone");
                drawing.text();
                for key in [
                    KeyCode::Enter,
                    KeyCode::End,
                    KeyCode::Char('?'),
                    KeyCode::Char('/'),
                ] {
                    drawing.press(&[key]);
                    drawing.text();
                }
                drawing.picture = None;
                drawing.text();
            }
        }
    }

    #[test]
    fn the_marked_service_is_in_sight_and_marked_without_colours_too() {
        let mut drawing = Drawing::new(80, 6);
        drawing.has_colours = false;
        drawing.press(&[KeyCode::End]);
        let text = drawing.text();
        assert!(
            text.contains("shop/idle:http") && !text.contains("shop/web"),
            "{text}"
        );
        let buffer = drawing.draw();
        let marked = |y| buffer[(79, y)].modifier.contains(Modifier::REVERSED);
        let lines: Vec<_> = (0..6).map(marked).collect();
        assert_eq!(lines, [false, false, false, true, false, false], "{text}");
        let colours = buffer.content.iter().map(|cell| cell.fg);
        assert!(colours.into_iter().all(|colour| colour == Color::Reset));
    }

    #[test]
    fn what_is_bad_is_red() {
        let mut drawing = Drawing::new(80, 10);
        drawing.press(&[KeyCode::Enter]);
        let buffer = drawing.draw();
        let red = |y: u16| -> String {
            let cells = (0..80).map(|x| &buffer[(x, y)]);
            let red = cells.filter(|cell| cell.fg == Color::Red);
            red.map(Cell::symbol).collect::<String>().trim().to_owned()
        };
        assert_eq!(
            [4, 5, 6, 8].map(red),
            ["2", "", "1", "refused: no_backend 3.5/s"]
        );
    }

    #[test]
    fn what_goes_on_is_said() {
        let mut drawing = Drawing::new(80, 10);
        drawing.trouble = Some("read klb_meta: no such file");
        drawing.press(&[KeyCode::Char('p'), KeyCode::Char('/'), KeyCode::Char('d')]);
        let text = drawing.text();
        for part in ["paused", "no such file", "\n/d█\n", "Esc all again"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        drawing.press(&[KeyCode::Enter]);
        let text = drawing.text();
        assert!(
            text.contains("with \"d\"") && !text.contains("shop/web"),
            "{text}"
        );
        drawing.picture = None;
        assert!(drawing.text().contains("counting …"));
    }

    #[test]
    fn a_name_that_is_too_long_keeps_its_end() {
        let names = ["[fd00:10:244:1234:5678:9abc:def0:1]:3000".to_owned()];
        let layout = Layout::new(&BACKEND_COLUMNS, &names, Sort::Connections, 40);
        assert_eq!(layout.padded(&names[0]).chars().count(), layout.name);
        assert!(layout.padded(&names[0]).ends_with("def0:1]:3000"));
        // There is room for the whole of it, beside what matters most.
        let layout = Layout::new(&BACKEND_COLUMNS, &names, Sort::Connections, 80);
        assert_eq!(layout.padded(&names[0]).trim_end(), names[0]);
        let headers: Vec<_> = layout.columns.iter().map(|column| column.header).collect();
        assert_eq!(headers, ["SHARE", "CONN/S", "RESET", "SILENT"]);
    }

    const SERVICES_80: &str = "\
klb top  every 1s  by connections
3 Services  1274 conn/s  64.3k pkt/s  4.6M byte/s  12.7k flows
SERVICE                                   BACKENDS  CONN/S  PKT/S  BYTE/S  FLOWS
shop/web:http                                    3    1234  12.3k    4.6M    345
kube-system/dns UDP                              1      40  52.0k     900  12.3k
shop/idle:http                                   0       0      0       0      0


refused: no_backend 3.5/s
q quit  ? help  ↑↓ move  Enter backends  s sort  / filter  p pause
";
    const SERVICES_40: &str = "\
klb top  every 1s  by connections
3 Services  1274 conn/s  64.3k pkt/s
SERVICE                   CONN/S  BYTE/S
shop/web:http               1234    4.6M
kube-system/dns UDP           40     900
shop/idle:http                 0       0


refused: no_backend 3.5/s
q quit  ? help  ↑↓ move  Enter backends
";
    const BACKENDS_80: &str = "\
klb top  every 1s  by connections
3 backends  1234 conn/s  12.3k pkt/s  4.6M byte/s  345 flows
shop/web:http
BACKEND                       SHARE  CONN/S  PKT/S  BYTE/S  FLOWS  RESET  SILENT
10.244.0.5:3000         ███     50%     617   6150    2.3M    170      2       0
10.244.0.6:3000         ███     50%     617   6195    2.3M    170      0       0
10.244.0.7:3000                  0%       -      -       -      5      0       1

refused: no_backend 3.5/s
q quit  ? help  Esc back  ↑↓ scroll  s sort  p pause
";
    const BACKENDS_40: &str = "\
klb top  every 1s  by connections
3 backends  1234 conn/s  12.3k pkt/s
shop/web:http
BACKEND                    SHARE  CONN/S
10.244.0.5:3000      ███     50%     617
10.244.0.6:3000      ███     50%     617
10.244.0.7:3000               0%       -

refused: no_backend 3.5/s
q quit  ? help  Esc back  ↑↓ scroll
";
}
