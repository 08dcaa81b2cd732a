#!/usr/bin/env bun
/**
 * The terminal client of bun-chat: a chat room over TCP, one message a line.
 *
 *     bun client.ts                                      the menu, on the server of this machine
 *     bun client.ts --host chat.example.org --name Alex  straight into that room
 *     tail -f app.log | bun client.ts --name logbot      in a pipe it is a tool
 *
 * It speaks Budget Chat (https://protohackers.com/problem/3) with any server. `receiveMessages` owns
 * the connection and keeps it up, and `sendMessages` passes on what is typed. They meet at a screen: a
 * terminal, where what arrives never disturbs what is being typed, or a pipe. The server is a
 * stranger: no byte of it reaches the terminal as a control, and it cannot make the client grow.
 *
 * A server of bun-chat keeps a history. The client follows it, so that a lost connection costs no line
 * in either direction, and none comes twice.
 *
 * From top to bottom: options and limits, text, what a line means, how it is shown, lines on their way,
 * the history, passwords, the connection, the editor of a line, the display, the two screens, the
 * conversation, the program.
 */

import { X509Certificate } from "node:crypto";
import { readFileSync, write, writeSync } from "node:fs";
import { emitKeypressEvents } from "node:readline";
import { isatty } from "node:tty";
import { parseArgs } from "node:util";

const { stdin, stdout } = process;

// --- Options and limits ------------------------------------------------------------------------

const VERSION = "0.1.0";
const DEFAULTS = { host: "127.0.0.1", port: 5555, recall: 10 };

/** Where the server is, and whom to trust under TLS. */
type Address = { host: string; port: number; tls: boolean | { ca: string } };

/** Times in ms. A test may change them before it calls `main`. */
export const PACE = {
  silence: 10_000, // for a server to say something
  queue: 90_000, // for its greeting when we come back, and others of our address with us
  proof: 240_000, // for a server to look at our password, while others wait for the same
  moment: 1000, // after which words without a newline are taken for a line
  doubt: 2000, // in which the end of the connection makes a refusal of the last words
  retry: 1000, // before the first new try
  lastWords: 30_000, // of silence after our end, in which a server may still close
  perLine: 200, // of silence more for each short line, because a room may take them slowly
  blank: 300, // in which more input shows that an empty line does not end the program
  pasted: 100, // between two pasted lines, after the first ones
  crowd: 200, // in which several arrivals, or departures, share a line
  patience: 2000, // before a word about a server that takes its time while we leave
  signal: 1000, // after a signal, before we stop waiting for the server
  exit: 2000, // after a signal, before we stop waiting for the terminal, too
};

const MAX_LINE = 1024 * 1024; // characters of a line; a roster of 10,000 names has 350,000
const MAX_SHOWN = 8192; // characters of a line that are shown; a message has 4096 bytes
const MAX_ANSWER = 20; // lines that a server may use for a refusal
const MAX_TYPED = 8192; // characters of a line that is being typed
const MAX_PEOPLE = 10_000; // names remembered for Tab
const MAX_TYPED_LINES = 1000; // that Up brings back
const MAX_RECALL = 200; // lines of the history that a server shows
const MAX_MESSAGE = 4096; // bytes of a line that a server of ours takes
const MAX_HELD = 16 * 1024 * 1024; // characters of lines that wait for a mark: a batch of short ones
const LINE_OVERHEAD = 200; // characters that such a line counts besides its text
const MAX_UNDER_WAY = 1024 * 1024; // bytes of lines that were sent and have not come back
const MAX_OUTPUT = 64 * 1024; // characters that may wait for the terminal before we stop reading
const PASTED_AT_ONCE = 20; // lines; the others go one by one
const SHORT_PASTE = 5; // lines that are not worth a word

// --- Text --------------------------------------------------------------------------------------
// Bytes become lines, and lines are cleaned, from a server as from a pipe. Nothing here knows a
// connection or a terminal.

// The characters that the server takes out, too: C0 but tab, DEL, C1, line separators, what turns the
// direction of a text around (Unicode UAX #9), and invisible characters that can hide text.
const UNCLEAN =
  /[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;

/** What may be shown of a text: nothing that steers a terminal or reorders the text. */
export function cleanText(text: string): string {
  return text.replace(UNCLEAN, "");
}

/**
 * Returns a function that takes the next bytes of a stream and returns the lines they complete, of
 * `limit` characters at most and cleaned. Without bytes it returns what is left as a last line.
 */
export function splitLines(limit: number): (chunk?: Uint8Array) => string[] {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let unfinished = "";

  return (chunk) => {
    const text = chunk ? decoder.decode(chunk, { stream: true }) : decoder.decode();
    const [first = "", ...others] = text.split("\n");
    const lines = [unfinished + first, ...others].map((line) => line.slice(0, limit));
    unfinished = lines.pop() ?? "";
    if (chunk) return lines.map(cleanText);

    const rest = cleanText(unfinished);
    unfinished = "";
    return rest ? [rest] : [];
  };
}

// A grapheme cluster is what a person takes for one character (Unicode UAX #29).
const segmenter = new Intl.Segmenter();

function graphemes(text: string): string[] {
  return Array.from(segmenter.segment(text), ({ segment }) => segment);
}

const ASCII = /^[\x20-\x7e]*$/;

// Terminals agree only on these to take no column, and draw some letters wider than others do.
const NO_COLUMN = /^[\p{Mn}\p{Me}\u200c\u200d]$/u;
const TWO_COLUMNS = /^[\u3248-\u324f]$/;

/** The columns that a text takes at most: a terminal may draw the parts of a cluster on their own. */
function columnsOf(text: string): number {
  if (ASCII.test(text)) return text.length;

  let columns = 0;
  for (const character of text) {
    const least = TWO_COLUMNS.test(character) ? 2 : 1;
    if (!NO_COLUMN.test(character)) columns += Math.max(least, Bun.stringWidth(character));
  }
  return Math.max(columns, Bun.stringWidth(text));
}

/** The clusters of a text. An absurdly wide one, such as a chain of skin tones, is cut. */
function partsOf(text: string, most: number): string[] {
  return graphemes(text).flatMap((grapheme) => {
    return columnsOf(grapheme) > most ? Array.from(grapheme) : [grapheme];
  });
}

/**
 * Breaks a text between words, so that no row of it begins at the left, where real lines begin. A
 * word of ASCII that is longer than a row, such as a URL, is left to the terminal, so that it can be
 * copied. Any other long word is broken.
 * @param start the column where the text begins
 * @param indent the column where further rows begin
 * @param columns of the terminal
 */
export function wrapText(text: string, start: number, indent: number, columns: number): string {
  let wrapped = "";
  let column = start;

  const add = (part: string, width: number) => {
    wrapped += part;
    column += width;
  };
  const breakRow = () => {
    wrapped += `\n${" ".repeat(indent)}`;
    column = indent;
  };

  for (const word of text.replaceAll("\t", "    ").match(/ +|[^ ]+/g) ?? []) {
    const width = columnsOf(word);
    const isLong = indent + width > columns;
    if (column + width <= columns) {
      add(word, width);
    } else if (word.startsWith(" ")) {
      breakRow();
    } else if (!isLong) {
      breakRow();
      add(word, width);
    } else if (ASCII.test(word)) {
      add(word, columns - column); // what follows begins a new row
    } else {
      // Anything but ASCII may be a blank in disguise, so it gets no row that begins at the left.
      for (const part of partsOf(word, columns / 2)) {
        if (column + columnsOf(part) > columns) breakRow();
        add(part, columnsOf(part));
      }
    }
  }
  return wrapped;
}

// --- What a line means -------------------------------------------------------------------------

/** A line of the room, with the parts that say what it is. A mere notice has none. */
export type Entry = {
  text: string;
  at?: number; // ms since 1970; when it was said, if that was not just now
  isRecalled?: boolean; // it is from the history
} & Partial<Record<Part, string>>;
type Part = "from" | "to" | "who" | "did" | "renamed" | "roster";

// A name has no space and no punctuation, so nothing that people say can look like one of these. Some
// scripts cannot do without joiners.
const NAME = "[\\p{L}\\p{N}][\\p{L}\\p{M}\\p{N}\\u200c\\u200d]{0,63}";
const FORMS = [
  `\\[(?<from>${NAME})(?: -> (?<to>${NAME}))?\\] `,
  `\\* (?<who>${NAME}) has (?<did>joined|entered|left) the (?:chat|room)`,
  `\\* (?<who>${NAME}) is now called (?<renamed>${NAME})$`,
  `\\* (?:The room contains|\\d+ (?:people are|person is) here):(?<roster>.*)`,
];
const FORM = new RegExp(`^(?:${FORMS.join("|")})`, "u");

/** Finds out what a line is: a message, news of somebody, a roster, or none of them. */
export function classify(text: string): Entry {
  return { text, ...FORM.exec(text)?.groups };
}

/** A copy of its own: a part of a line would keep all of the line in memory. */
function copyOf(text: string): string {
  return Buffer.from(text).toString();
}

function namesIn(roster: string): string[] {
  return roster.match(/[^\s,]+/g) ?? [];
}

/** Names are the same in whatever case they are written: STRASSE is Straße. */
function isSameName(a: string, b: string): boolean {
  return foldName(a) === foldName(b);
}

function foldName(name: string): string {
  return name.normalize("NFKC").toLowerCase().toUpperCase().toLowerCase();
}

/** The names of the people here, with the number of the last line that names each. */
type People = Map<string, number>;

let linesRemembered = 0;

/** Learns from a line about the people here, and about the order in which they speak. */
function remember(people: People, entry: Entry): void {
  const { from, to, who, did, renamed, roster } = entry;
  if (roster !== undefined) people.clear();
  if (who && (did === "left" || renamed)) people.delete(who);

  const present = roster === undefined ? [from, to, renamed] : namesIn(roster);
  if (did !== "left" && !renamed) present.push(who);
  linesRemembered++;
  for (const name of present) {
    const isKept = name && (people.has(name) || people.size < MAX_PEOPLE);
    if (isKept) people.set(copyOf(name), linesRemembered);
  }
}

/** Their names, the latest speakers last. */
function bySpeech(people: People): string[] {
  return Array.from(people.keys()).sort((a, b) => (people.get(a) ?? 0) - (people.get(b) ?? 0));
}

type Command = { name: string; parameters: string; help: string };

/** What begins with a slash. The server does all of it but /ignore and /quit. */
const COMMANDS: readonly Command[] = [
  { name: "/help", parameters: "", help: "what the server can do" },
  { name: "/who", parameters: "", help: "who is here" },
  {
    name: "/nick",
    parameters: "NAME",
    help: "be called NAME (/nick NAME PASSWORD, if it is registered)",
  },
  { name: "/msg", parameters: "NAME TEXT", help: "say TEXT to NAME and to nobody else" },
  { name: "/history", parameters: "N", help: "the last N lines that were said" },
  { name: "/register", parameters: "", help: "make your name your own, by a password" },
  { name: "/password", parameters: "", help: "change that password" },
  { name: "/unregister", parameters: "", help: "give the name up" },
  {
    name: "/ignore",
    parameters: "NAME",
    help: "hide what NAME says; again to undo, alone to list",
  },
  { name: "/quit", parameters: "", help: "end the program" },
];

/** What Tab offers for the text before the cursor: whole replacements of it, the best first. */
export function complete(before: string, people: Iterable<string>): string[] {
  const word = /\S*$/.exec(before)?.[0] ?? "";
  const kept = before.slice(0, before.length - word.length);
  const isOffered = (offer: string) => offer.toLowerCase().startsWith(word.toLowerCase());
  if (kept === "" && word.startsWith("/"))
    return COMMANDS.map(({ name }) => `${name} `).filter(isOffered);

  const at = word.startsWith("@") ? "@" : "";
  const end = kept === "" && at === "" ? ": " : " ";
  const names = Array.from(people, (name) => at + name).filter(isOffered);
  names.reverse();
  const exact = names.filter((name) => isSameName(name, word));
  return [...new Set([...exact, ...names])].map((name) => kept + name + end);
}

// --- How a line is shown -----------------------------------------------------------------------

// A terminal that knows no escape codes, or takes bytes for something else than UTF-8, gets plain
// lines. In an 8-bit terminal half of a UTF-8 character may be a control.
const LOCALE = process.env["LC_ALL"] || process.env["LC_CTYPE"] || process.env["LANG"] || "UTF-8";
const IS_UTF8 = /utf-?8/i.test(LOCALE);
const IS_PLAIN = process.env["TERM"] === "dumb" || !IS_UTF8;
const IS_COLOURED = stdout.isTTY && stdout.hasColors() && !IS_PLAIN;

/** What a terminal may get. */
function encode(text: string): string {
  return IS_UTF8 ? text : text.replace(/[^\n\x07\x20-\x7e]/gu, "?");
}

// Of the 256 colours those with a contrast of 4:1 or better on black and on white alike.
const COLOURS = [28, 30, 31, 62, 64, 97, 99, 130, 131, 133, 161, 163];
const DIM = "2";
const BOLD = "1";
const PRIVATE = "1;35"; // bold and magenta

/** Paints a text with a style (ECMA-48, SGR). */
function paint(style: string, text: string): string {
  return IS_COLOURED ? `\x1b[${style}m${text}\x1b[0m` : text;
}

/** How somebody's words look: the sender in a steady colour, and all of it when they matter more. */
type Style = { sender: string; text: string; rings: boolean };

const NOTICE: Style = { sender: DIM, text: DIM, rings: false };
const OWN: Style = { sender: DIM, text: "0", rings: false };

function styleOf({ from, to, text, isRecalled }: Entry, reader: string): Style {
  if (!from || isRecalled) return NOTICE;
  const isOwn = isSameName(from, reader);
  if (to) return { sender: PRIVATE, text: PRIVATE, rings: !isOwn };

  const colour = `38;5;${COLOURS[Bun.hash.crc32(from.toLowerCase()) % COLOURS.length]}`;
  const words = text.toLowerCase().slice(from.length + 2);
  const isMention = words.split(/[^\p{L}\p{M}\p{N}\u200c\u200d]+/u).includes(reader.toLowerCase());
  if (!isMention) return { sender: colour, text: "0", rings: false };
  return { sender: `1;7;${colour}`, text: BOLD, rings: true };
}

function cut(text: string): string {
  return text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}… (cut)` : text;
}

/** The time of a line, in ms, with its date if that is not today's. */
function formatTime(at: number): string {
  const [date, time = ""] = formatDate(at).split(" ");
  return formatDate(Date.now()).startsWith(`${date} `) ? time : `${date} ${time}`;
}

function formatDate(at: number): string {
  return new Date(at).toLocaleString("sv").slice(0, "2026-12-31 23:59".length);
}

/** A line with its time, wrapped under the beginning of its text. */
function layOut(
  sender: string,
  text: string,
  style: Style,
  columns: number,
  at = Date.now(),
): string {
  const time = formatTime(at);
  const start = columnsOf(`${time} ${sender}`);
  const indent = Math.min(start, columns >> 1);
  const wrapped = wrapText(encode(cut(text)), Math.min(start, columns), indent, columns);
  return `${paint(DIM, time)} ${paint(style.sender, sender)}${paint(style.text, wrapped)}\n`;
}

/** An entry as its reader sees it, with a bell if it is meant for them and they want one. */
function layOutEntry(entry: Entry, reader: string, columns: number, bell: string): string {
  const { text } = entry;
  const style = styleOf(entry, reader);
  const [sender = ""] = (entry.from ? /^\[[^\]]*\] / : /^\* /).exec(text) ?? [];
  const shown = layOut(sender, text.slice(sender.length), style, columns, entry.at);
  return shown + (style.rings ? bell : "");
}

/** A roster that takes more than two rows is counted, sorted and cut. */
export function shortenRoster(entry: Entry, columns: number): string {
  const room = 2 * columns - 20; // what the time, the indent and breaks between words leave
  const names = namesIn(entry.roster ?? "");
  if (names.length === 0 || columnsOf(entry.text) <= room) return entry.text;

  const begin = `* ${names.length} people are here: `;
  const end = (hidden: number) => ` and ${hidden} more (/who shows all)`;
  let used = columnsOf(begin + end(names.length));
  let shown = 0;
  names.sort(new Intl.Collator().compare);
  for (const name of names) {
    used += columnsOf(name) + 2;
    if (used > room) break;
    shown++;
  }
  if (shown === names.length) return entry.text;
  return begin + names.slice(0, shown).join(", ") + end(names.length - shown);
}

/** Neighbours that all joined, or all left, are one line. Only the first of them are kept. */
type Crowd = { did: string; names: string[]; count: number; first: Entry };

/** Whether an entry may be merged with its neighbours. A kick or a ban stands alone. */
function isCrowded({ did, text }: Entry): boolean {
  return did !== undefined && !/ \((?:kicked|banned) by /.test(text);
}

function minuteOf({ at = Date.now() }: Entry): number {
  return Math.floor(at / 60_000);
}

function entryOf({ did, names, count, first }: Crowd): Entry {
  if (count === 1) return first;
  const shown = count > 3 ? [...names.slice(0, 2), `${count - 2} others`] : names;
  return { ...first, text: `* ${new Intl.ListFormat("en-GB").format(shown)} have ${did}` };
}

// --- Lines on their way ------------------------------------------------------------------------

type Connection = Bun.Socket<undefined>;

/** A room takes a long line more slowly, ours one of 4096 bytes like nine short ones. */
function costOf({ length }: Uint8Array): number {
  return 1 + Math.floor(length / 512);
}

/**
 * A line on its way. A server of ours confirms each of them: what is said comes back, and a command is
 * answered, as is a line that is too long. Nothing is sent behind a change of our name or its password
 * before that is answered: what is said comes back under our name, and a password is for one name.
 */
type Outgoing = { bytes: Uint8Array; kind: "said" | "command" | "change" };

/** How a server of ours confirms a line. */
function kindOf(text: string, { length }: Uint8Array): Outgoing["kind"] {
  if (/^\/(?:nick|register|password|unregister)(?:\s|$)/iu.test(text)) return "change";
  const isTooLong = length > MAX_MESSAGE + 1; // with the newline
  return isTooLong || /^\/(?!\/)/.test(text) ? "command" : "said";
}

/** A line without its newline. Blanks at its end may belong to a password. */
function textOf({ bytes }: Outgoing): string {
  return Buffer.from(bytes).toString().slice(0, -1);
}

type Outbox = ReturnType<typeof createOutbox>;

/** Lines that wait to be sent, and those that were sent and may not have arrived. */
export function createOutbox() {
  let waiting: Outgoing[] = [];
  let taken = 0; // bytes of the first line that waits, which the kernel has
  let flushed: PromiseWithResolvers<void> | null = null; // resolves when nothing waits any more

  let underWay: Outgoing[] = []; // sent to a server of ours, which has not confirmed them yet
  let bytesUnderWay = 0;

  let unconfirmed = 0; // lines sent to another server, which confirms nothing, on this connection
  let unconfirmedCost = 0; // of these, in short lines
  let lastSent = -Infinity; // ms

  const isSaid = ({ kind }: Outgoing) => kind === "said";
  const isCommand = ({ kind }: Outgoing) => kind !== "said";

  function confirm(isWanted: (line: Outgoing) => boolean): void {
    const place = underWay.findIndex(isWanted);
    if (place === -1) return;
    const [line] = underWay.splice(place, 1);
    bytesUnderWay -= line?.bytes.length ?? 0;
  }

  function takeUnderWay(): Outgoing[] {
    const lines = underWay;
    underWay = [];
    bytesUnderWay = 0;
    return lines;
  }

  function handleSent(line: Outgoing, isConfirmed: boolean): void {
    lastSent = performance.now();
    if (isConfirmed) {
      underWay.push(line);
      bytesUnderWay += line.bytes.length;
    } else {
      unconfirmed++;
      unconfirmedCost += costOf(line.bytes);
    }
  }

  function release(): void {
    flushed?.resolve();
    flushed = null;
  }

  return {
    /** Resolves what `add` returned: nothing will be sent any more. */
    release,

    /** Lines that were not sent. */
    get unsent() {
      return waiting.length;
    },

    /** Lines that were sent and may not have arrived. */
    get doubtful() {
      return unconfirmed + underWay.length;
    },

    /** Whether nothing waits to be sent, or would be sent again if the connection were lost now. */
    get isSettled() {
      return waiting.length === 0 && !underWay.some(isSaid);
    },

    /** What sent and unsent lines cost, in short lines. */
    get cost() {
      const lines = [...underWay, ...waiting];
      return lines.reduce((sum, { bytes }) => sum + costOf(bytes), unconfirmedCost);
    },

    get lastSent() {
      return lastSent;
    },

    /** The change of our name or its password that is not answered yet, or "". */
    get change() {
      const last = underWay.at(-1);
      return last?.kind === "change" ? textOf(last) : "";
    },

    /** Adds a line. Resolves when nothing waits any more, or will be sent any more. */
    add(text: string): Promise<void> {
      flushed ??= Promise.withResolvers();
      const bytes = Buffer.from(`${text}\n`);
      waiting.push({ bytes, kind: kindOf(text, bytes) });
      return flushed.promise;
    },

    /** Writes what waits, as far as the kernel takes it, and no more than may be unconfirmed. */
    writeTo(socket: Connection, isConfirmed: boolean): void {
      while (bytesUnderWay < MAX_UNDER_WAY && underWay.at(-1)?.kind !== "change") {
        const [line] = waiting;
        if (!line) {
          release();
          return;
        }
        taken += Math.max(0, socket.write(line.bytes.subarray(taken)));
        if (taken < line.bytes.length) return;
        waiting.shift();
        taken = 0;
        handleSent(line, isConfirmed);
      }
    },

    /** What was said first has come back. */
    confirmSaid: () => confirm(isSaid),

    /** The first command was answered. */
    confirmCommand: () => confirm(isCommand),

    /**
     * The connection is lost. A line that was cut in two is sent again in full: a server drops the half.
     * @returns how many lines may be lost, because they are not sent again
     */
    handleLoss(): number {
      const isSecret = (line: Outgoing) => hasPassword(textOf(line));
      const secrets = waiting.filter(isSecret).length; // the next connection may not be safe
      const lost = unconfirmed + underWay.filter(isCommand).length + secrets;
      waiting = waiting.filter((line) => !isSecret(line));
      underWay = underWay.filter(isSaid);
      bytesUnderWay = underWay.reduce((sum, { bytes }) => sum + bytes.length, 0);
      taken = 0;
      unconfirmed = 0;
      unconfirmedCost = 0;
      return lost;
    },

    /** What has not come back did not arrive: it waits again, before all else. */
    requeue(): void {
      waiting = [...takeUnderWay(), ...waiting];
    },

    /** Nothing is sent again, because nobody can know what has arrived. @returns how many lines */
    abandon(): number {
      return takeUnderWay().length;
    },

    clear(): void {
      waiting = [];
      takeUnderWay();
      taken = 0;
      unconfirmed = 0;
      unconfirmedCost = 0;
    },
  };
}

// --- The history -------------------------------------------------------------------------------
// A server of ours answers "/since POSITION" with "* Since FROM until JOINED", and then sends all that the
// room has heard since, in batches, each followed by its mark, "* POSITION": see README.md, "For
// programs that must not miss a line".

const SINCE = /^\* Since (\d{1,16}) until (\d{1,16})$/;
const MARK = /^\* (\d{1,16})$/;
const RECALLED = /^\* (\d{16}) (\[.*)/s; // a line of the history, with its position
const ANSWERED = "* Answered"; // after the answer to each command
const SERVER_SAYS = /^\* The server (?:says: |is shutting down$)/; // to everybody

const RECALL_END: Entry = { text: "* ---" };
const GAP: Entry = { text: "* Some lines are missing here." };

/** How far a connection has come. */
type Progress =
  | { at: "asking" } // nothing has been answered yet
  // What comes now was said before we joined, which was after this position. If we have been in the room
  // before, we have missed it. Otherwise some of it may be recalled.
  | { at: "catchingUp"; joinedAfter: number; isMissed: boolean }
  | { at: "present" };

/**
 * What some lines have brought: entries from before our arrival, whether we have arrived, entries from
 * then on, and how many of our own lines are in doubt.
 */
type News = { missed: Entry[]; hasArrived: boolean; present: Entry[]; doubtful: number };

function noNews(): News {
  return { missed: [], hasArrived: false, present: [], doubtful: 0 };
}

function classifyFollowed(line: string): Entry {
  const [, at, said = ""] = RECALLED.exec(line) ?? [];
  if (at === undefined) return classify(line);
  return { ...classify(said), at: Number(at) / 1000, isRecalled: true };
}

/** Whether only we are told a line. It has no mark, and does not come again. */
function isTold({ from, to, did, renamed, text, isRecalled }: Entry): boolean {
  const isHeard = (from && !to) || did || renamed || SERVER_SAYS.test(text);
  return !isHeard || isRecalled === true;
}

/**
 * Follows a room through all connections to it, so that each line comes once. A line counts when its
 * mark has come. Our own lines come back, which shows that they have arrived.
 * @param recall lines of the history to begin with
 */
export function createFollower(outbox: Outbox, recall = 0) {
  let progress: Progress = { at: "asking" };
  let position: number | null = null; // of the last mark; null before the first answer
  let me: string | null = null; // the name under which we are heard; null while that is uncertain
  let hasRecalled = false; // lines of the history were shown, and their end was not
  let held: Entry[] = []; // lines that have no mark yet, and what was told between them
  let heldLength = 0; // characters
  let news = noNews();

  function add(entry: Entry): void {
    if (progress.at === "present") {
      news.present.push(entry);
    } else {
      news.missed.push(entry);
      hasRecalled ||= entry.isRecalled === true;
    }
  }

  function hold(entry: Entry): void {
    held.push(entry);
    heldLength += entry.text.length + LINE_OVERHEAD;
  }

  function takeHeld(): Entry[] {
    const entries = held;
    held = [];
    heldLength = 0;
    return entries;
  }

  function hearTold(entry: Entry): void {
    if (entry.text === ANSWERED) outbox.confirmCommand();
    else add(entry);
  }

  /** Before our arrival, `me` is our name on the last connection. Somebody else may have it since. */
  function hear(entry: Entry, at: number): void {
    const { from, who, did, renamed } = entry;
    if (me !== null && from === me) {
      outbox.confirmSaid();
      return;
    }

    const isRename = who === me && renamed !== undefined;
    const isUncertain = renamed === me || (who === me && did !== undefined);
    if (me !== null && isRename) me = renamed;
    else if (isUncertain) me = null;

    if (progress.at === "present") {
      add(entry);
    } else if (progress.at === "catchingUp" && progress.isMissed) {
      add({ ...entry, at: at / 1000 });
    } else if (progress.at === "catchingUp" && from !== undefined && recall > 0) {
      add({ ...entry, at: at / 1000, isRecalled: true }); // it was said in the moment of our arrival
    }
  }

  /** The answer to /since. It comes again wherever something is missing. */
  function takeSince(since: number, joinedAfter: number, name: string): void {
    dropHeld();
    if (progress.at !== "asking") {
      addGap();
    } else if (position === null) {
      progress = { at: "catchingUp", joinedAfter, isMissed: false };
    } else {
      const isSameHistory = position <= joinedAfter; // our last mark is older than our arrival
      if (since !== position || !isSameHistory) addGap();
      progress = { at: "catchingUp", joinedAfter, isMissed: true };
    }
    position = since;
    if (since > joinedAfter) arrive(name);
  }

  function addGap(): void {
    add(GAP);
    if (progress.at === "present") return; // there is nothing to find out about our own lines
    me = null;
    news.doubtful += outbox.abandon();
  }

  function takeMark(at: number, name: string): void {
    const batch = takeHeld();
    const isArrival = progress.at === "catchingUp" && at > progress.joinedAfter;
    const isOwn = ({ did, who = "" }: Entry) => did === "joined" && isSameName(who, name);
    const arrival = isArrival ? batch.findLast(isOwn) : undefined;

    position = at;
    for (const entry of batch) {
      if (entry === arrival) arrive(entry.who ?? name);
      else if (isTold(entry)) hearTold(entry);
      else hear(entry, at);
    }
    if (isArrival) arrive(name);
  }

  function arrive(name: string): void {
    if (progress.at === "present") return;
    if (hasRecalled) add(RECALL_END);
    hasRecalled = false;
    progress = { at: "present" };
    news.hasArrived = true;
    me = name;
    outbox.requeue();
  }

  /** What was held has no mark and comes again, except what we were told. */
  function dropHeld(): void {
    // No command is confirmed: what came of it may be among what comes again, as a new name is.
    for (const entry of takeHeld()) if (isTold(entry) && entry.text !== ANSWERED) add(entry);
  }

  return {
    /** Begins to follow on a new connection. @returns what to send */
    begin(): string {
      progress = { at: "asking" };
      takeHeld();
      if (position !== null) return `/since ${position}`;
      return recall > 0 ? `/since -${recall}` : "/since";
    },

    /** Takes lines as they come. `name` is ours on this connection. */
    take(lines: string[], name: string): News {
      news = noNews();
      for (const line of lines) {
        const [, since, joinedAfter] = SINCE.exec(line) ?? [];
        const [, mark] = MARK.exec(line) ?? [];
        const entry = classifyFollowed(line);
        const isAtOnce = isTold(entry) && held.length === 0 && progress.at !== "asking";
        if (since !== undefined) takeSince(Number(since), Number(joinedAfter), name);
        else if (mark !== undefined) takeMark(Number(mark), name);
        else if (isAtOnce) hearTold(entry);
        else hold(entry);
        if (heldLength > MAX_HELD) takeMark(position ?? 0, name); // a server of ours never gets here
      }
      return news;
    },

    /** The connection is lost, and there will be another one. @returns what we were told at last */
    lose(): Entry[] {
      news = noNews();
      if (progress.at === "asking") held = held.filter(({ isRecalled }) => !isRecalled); // comes again
      dropHeld();
      return [...news.missed, ...news.present];
    },

    /** We leave, so nothing comes again: what has no mark counts as well. @returns the last lines */
    finish(): Entry[] {
      news = noNews();
      takeMark(position ?? 0, me ?? "");
      return [...news.missed, ...news.present];
    },
  };
}

// --- Passwords ---------------------------------------------------------------------------------
// Some servers let people register names, ours by "/register PASSWORD": see README.md, "Names that are
// yours". A password is never shown, and kept in memory only, for the next connection.

// A command that ends with a password. Blanks before it are a mistake, but the password is one.
const WITH_PASSWORD =
  /^(?<before>\s*\/(?:register|password|nick\s+(?<name>\S+))\s)(?<password>.*\S.*)$/isu;

/** Whether a line is a command with a password. */
function hasPassword(line: string): boolean {
  return line.startsWith("/") && WITH_PASSWORD.test(line);
}

/** Masks the password in a command. */
export function hidePassword(text: string): string {
  const { before = "", password = "" } = WITH_PASSWORD.exec(text)?.groups ?? {};
  return password === "" ? text : before + "*".repeat(password.length);
}

// What a server of ours answers to such commands.
const PASSWORD_SET = /^\* The (?:name|password of) \S+ is (?:registered now|changed)\./;
const UNREGISTERED = /^\* The name \S+ is not registered any more\.$/;

/** A name and its password. */
type Login = { name: string; password: string };

/** What a command would make of our name and its password, or null if it has no password. */
function readLogin(command: string, ownName: string): Login | null {
  const { name = ownName, password } = WITH_PASSWORD.exec(command)?.groups ?? {};
  return password === undefined ? null : { name, password };
}

/** Knows the password of our name, for the next connection. */
export function createKeyring() {
  let known: Login | null = null;
  let possible: Login | null = null; // it was offered, and the answer was lost

  return {
    /** A new conversation begins, with a password or with none. */
    begin(name: string, password: string): void {
      known = password ? { name, password } : null;
      possible = null;
    },

    /**
     * Takes a line of the server, which may be the answer to a change of our name or its password.
     * @param change the command that waits for its answer, or ""
     */
    hear(line: string, change: string, ownName: string): void {
      const { who, renamed } = classify(line);
      // Our own name in other letters needs no password, so that proves nothing.
      const isTaken = renamed !== undefined && who === ownName && !isSameName(renamed, ownName);
      const login = readLogin(change, ownName);
      if (login && (isTaken || PASSWORD_SET.test(line))) known = login;
      if (UNREGISTERED.test(line)) known = null;
    },

    /** The connection is lost, and perhaps an answer with it. */
    handleLoss(change: string, ownName: string): void {
      possible = readLogin(change, ownName);
    },

    /** The password of a name, if it has one that we know. */
    passwordOf(name: string): string | undefined {
      return known && isSameName(known.name, name) ? known.password : undefined;
    },

    /** What we know is wrong. @returns whether there is another password to try */
    tryAnother(name: string): boolean {
      known = possible;
      possible = null;
      return known !== null && isSameName(known.name, name);
    },

    /** The name has no password any more. */
    forget(): void {
      known = null;
    },
  };
}

// --- The connection ----------------------------------------------------------------------------

/** Where the connection is. Each state holds just what exists while it lasts. */
type State =
  | { at: "offline" }
  | { at: "connecting" | "retrying"; timer: Timer }
  // Waiting for the greeting, or for the answer to our name. What was heard so far is a refusal if
  // the connection ends now.
  | { at: "greeting" | "entering"; socket: Connection; timer: Timer; heard: string[] }
  // Greeted, with no name given yet; or in the room.
  | { at: "lobby" | "joined"; socket: Connection }
  // In the room, but first comes what was missed, and then the roster.
  | { at: "catchingUp"; socket: Connection; timer: Timer; roster: Entry }
  // What was said must arrive. Then our FIN goes out, and the server closes.
  | { at: "leaving"; socket: Connection; timer: Timer };

/** What the person wants, which decides what the end of a connection means. */
type Goal = "enter" | "stay" | "leave";

/** What comes of leaving: lines that were not sent, and whether all others have arrived. */
type Farewell = { unsent: number; isComplete: boolean };

type Room = ReturnType<typeof receiveMessages>;

const OUR_GREETING = "Welcome to bun-chat! What is your name?";
const OLD_GREETING = "Welcome to the chat! What is your name?"; // of our servers without a history
const NO_REASON = "The server closed the connection: the name may be taken or not allowed.";
const LOST = "Connection lost.";
const NOT_CONNECTED = "Not connected: the password was not sent.";
const SENT_AWAY = "The server has ended our stay.";
const UNSAFE =
  "A password is sent only to a server of bun-chat, and under TLS or to this machine: it was not sent.";

// What a server of ours says when a name has a password, and when it shows us out.
const NEEDS_PASSWORD = /^\* The name \S+ is registered[.,]/;
const NEEDS_NO_PASSWORD = /^\* The name \S+ is not registered,/;
const BANNED = /^\* You are banned /;
const SHOWN_OUT = /^\* You (?:have come in from elsewhere\.$|were (?:kicked|banned) by )/;
const SAID_IN_DOUBT = "What you said last may not have arrived.";
const ASKED_IN_DOUBT = "What you asked for last may not have arrived.";
const RECENT = 10_000; // ms; older lines are taken to have arrived

const PROBLEMS: readonly { code: RegExp; advice: string }[] = [
  { code: /ECONNREFUSED/, advice: "Is the server running?" },
  { code: /ENOTFOUND/, advice: "There is no such host." },
  { code: /UNREACH|ADDRNOTAVAIL/, advice: "The network does not reach that host." },
  { code: /EPROTO/, advice: "It does not speak TLS: leave out --tls." },
  {
    code: /DEPTH_ZERO/,
    advice: "Its certificate is self-signed: get a copy from its owner, for --ca FILE.",
  },
  { code: /EXPIRED/, advice: "Its certificate has expired: its owner must renew it." },
  {
    code: /NOT_YET_VALID/,
    advice: "Its certificate is not valid yet: is the clock of this machine right?",
  },
  {
    code: /ALTNAME/,
    advice: "Its certificate is for a wrong host: give --host the name it was made for.",
  },
  {
    code: /ISSUER|LEAF|CHAIN/,
    advice: "Its certificate is from an unknown authority: get theirs, for --ca FILE.",
  },
];

/** As a person would type it, with brackets around an IPv6 address (RFC 3986, section 3.2.2). */
function formatEndpoint(host: string, port: number): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/** Whether a connection stays on this machine (RFC 6890; RFC 4291, section 2.5.3). */
function isThisMachine({ remoteAddress, localAddress }: Connection): boolean {
  return /^(?:::ffff:)?127\.|^::1$/i.test(remoteAddress) || remoteAddress === localAddress;
}

/**
 * Gets into a room and shows on `screen` what comes from there. When the connection is lost in the
 * room, makes it anew under the same name, until you leave.
 * @param recall lines to be shown from before you came
 */
export function receiveMessages({ host, port, tls }: Address, screen: Screen, recall = 0) {
  const unreachable = `Could not connect to ${formatEndpoint(host, port)}.`;
  let state: State = { at: "offline" };
  let goal: Goal = "enter";
  let hasArrived = false; // we have been in the room since we joined
  let isBanished = false; // the server does not let us stay: there is no coming back
  let name = "";
  const keyring = createKeyring();
  let isPrivate = false; // nobody on the way can read what is sent on this connection
  let tries = 0; // to get back
  let split = splitLines(MAX_LINE);
  let entered = Promise.withResolvers<{ refused?: string }>();
  let left = Promise.withResolvers<Farewell>();

  const outbox = createOutbox();
  let follower = createFollower(outbox, recall);
  let isFollowed = false; // whether the server of this connection keeps a history
  let lastHeard = -Infinity; // ms
  let isPaused = false; // until our output is read
  let isComplete = true; // false once lines may be lost

  const handlers: Bun.SocketHandler<undefined> = {
    open: handleOpen,
    data: handleData,
    drain: flush,
    close: handleClose,
    handshake(socket, _, error) {
      if (error && isCurrent(socket)) handleError(error);
    },
  };

  function change(next: State): void {
    if ("timer" in state) clearTimeout(state.timer);
    state = next;
  }

  function isCurrent(socket: Connection): boolean {
    return "socket" in state && state.socket === socket;
  }

  function connect(): void {
    split = splitLines(MAX_LINE);
    const timer = setTimeout(failSilent, PACE.silence);
    change({ at: "connecting", timer });
    Bun.connect({ hostname: host, port, tls, socket: handlers }).catch((error) => {
      const isLate = !("timer" in state) || state.timer !== timer;
      if (!isLate) handleError(error);
    });
  }

  function handleOpen(socket: Connection): void {
    if (state.at !== "connecting") {
      socket.end(); // too late, or a second one: a host may have several addresses
      return;
    }
    isPrivate = Boolean(tls) || isThisMachine(socket);
    waitFor("greeting", socket, goal === "enter" ? PACE.silence : PACE.queue);
  }

  function waitFor(at: "greeting" | "entering", socket: Connection, patience = PACE.silence): void {
    change({ at, socket, timer: setTimeout(failSilent, patience), heard: [] });
  }

  function handleData(socket: Connection, chunk: Uint8Array): void {
    if (!isCurrent(socket)) return;
    lastHeard = performance.now();
    const lines = split(chunk);

    if ("timer" in state && state.at !== "greeting") state.timer.refresh();
    if (state.at === "greeting") hearGreeting(lines);
    else if (state.at === "entering") hearAnswer(lines);
    else if (state.at !== "lobby") hearRoom(lines);
  }

  function hearGreeting(lines: string[]): void {
    if (state.at !== "greeting") return;
    const heard = [...state.heard, ...lines].slice(0, 2);
    const [first] = heard;

    if (first === undefined) {
      change({ ...state, timer: setTimeout(hearRest, PACE.moment) }); // some greet without a newline
    } else if (first.startsWith("*") && heard.length === 1) {
      change({ ...state, heard, timer: setTimeout(enterLobby, PACE.doubt, first) });
    } else {
      enterLobby(first);
    }
  }

  function hearRest(): void {
    const lines = split();
    if (lines.length > 0) hearGreeting(lines);
    else failSilent();
  }

  function enterLobby(greeting: string): void {
    if (state.at !== "greeting") return;
    const { socket } = state;
    isFollowed = greeting === OUR_GREETING;
    const isFamiliar = isFollowed || greeting === OLD_GREETING;
    if (goal === "enter" && !isFamiliar && screen.isPerson) screen.notice(greeting);
    change({ at: "lobby", socket });
    if (name) introduce(socket);
    else entered.resolve({});
  }

  function introduce(socket: Connection): void {
    split = splitLines(MAX_LINE); // without the rest of a greeting that has no newline
    const password = isSafe() ? keyring.passwordOf(name) : undefined;
    waitFor("entering", socket, password === undefined ? PACE.silence : PACE.proof);
    writeLine(socket, password === undefined ? name : cleanText(`${name} ${password}`));
  }

  /** Whether a password may be sent: to a server of ours, which does not tell it to everybody. */
  function isSafe(): boolean {
    return isPrivate && isFollowed;
  }

  function writeLine(socket: Connection, line: string): void {
    const bytes = Buffer.from(`${line}\n`);
    if (socket.write(bytes) !== bytes.length) fail(LOST);
  }

  /** A line of a known form proves that we are in. Any other may be a refusal: then the end follows. */
  function hearAnswer(lines: string[]): void {
    if (state.at !== "entering" || lines.length === 0) return;
    const heard = [...state.heard, ...lines];
    if (heard.some((line) => FORM.test(line)) || heard.length > MAX_ANSWER) enterRoom(heard);
    else change({ ...state, heard, timer: setTimeout(enterRoom, PACE.doubt, heard) });
  }

  function enterRoom(heard: string[]): void {
    if (state.at !== "entering") return;
    const { socket } = state;
    if (goal === "enter") goal = "stay";

    if (!isFollowed) {
      enterForeignRoom(socket, heard);
      return;
    }
    const [roster = "", ...others] = heard;
    const timer = setTimeout(failSilent, PACE.lastWords);
    change({ at: "catchingUp", socket, timer, roster: classify(roster) });
    writeLine(socket, follower.begin());
    hearRoom(others);
  }

  /** There is nothing to catch up with. */
  function enterForeignRoom(socket: Connection, heard: string[]): void {
    if (outbox.abandon() > 0) doubt(SAID_IN_DOUBT); // it was ours a moment ago
    stay(socket);

    const [answer = "", ...others] = heard;
    const entry = classify(answer);
    const roster = entry.roster ?? /^\*[^:]*:(.*)/.exec(answer)?.[1]; // in whatever words
    if (roster === undefined || entry.from) {
      hearRoom(heard);
    } else {
      screen.showRoster({ text: answer, roster });
      hearRoom(others);
    }
  }

  /** We are in the room, with all that was missed. What waits can be sent. */
  function stay(socket: Connection): void {
    if (goal === "leave") change({ at: "leaving", socket, timer: waitForLastWords() });
    else change({ at: "joined", socket });
    tries = 0;
    hasArrived = true;
    entered.resolve({});
    flush();
  }

  function hearRoom(lines: string[]): void {
    for (const line of lines) keyring.hear(line, outbox.change, name);
    takeLines(lines);
    if (lines.some((line) => SHOWN_OUT.test(line))) {
      showLastWords([]);
      endStay();
    }
  }

  function takeLines(lines: string[]): void {
    if (!isFollowed) {
      showPresent(lines.map(classify));
      return;
    }

    const { missed, hasArrived, present, doubtful } = follower.take(lines, name);
    show(missed);
    if (doubtful > 0) doubt(SAID_IN_DOUBT);
    if (hasArrived && state.at === "catchingUp") {
      screen.showRoster(state.roster);
      stay(state.socket);
    }
    showPresent(present);
    flush(); // what was confirmed makes room for more, or was the last to be waited for
  }

  /** A person is told at once, a tool by its exit code. */
  function doubt(words: string): void {
    if (screen.isPerson) screen.notice(words);
    else isComplete = false;
  }

  function showPresent(entries: Entry[]): void {
    for (const { who, renamed } of entries) if (renamed && who === name) name = copyOf(renamed);
    show(entries);
  }

  /** Shows what comes from the room, and reads no more before it is taken. */
  function show(entries: Entry[]): void {
    if (entries.length === 0 || screen.show(entries, name) || !("socket" in state)) return;

    const { socket } = state;
    isPaused = true;
    socket.pause();
    screen.whenTaken(() => {
      isPaused = false;
      if (state.at === "leaving" || state.at === "catchingUp") state.timer.refresh();
      socket.resume();
    });
  }

  /** Sends what waits, and then our FIN when leaving. */
  function flush(): void {
    if (state.at !== "joined" && state.at !== "leaving") return;
    outbox.writeTo(state.socket, isFollowed);
    if (state.at === "leaving" && outbox.isSettled) state.socket.shutdown();
  }

  function handleClose(socket: Connection, error?: Error): void {
    if (!isCurrent(socket)) return;
    const before = state;
    const lastWords = split(); // without a newline
    const allWords = "heard" in before ? cut(before.heard.concat(lastWords).join(" ")) : "";

    switch (before.at) {
      case "greeting":
        fail(allWords || `${unreachable} It closed the connection.`);
        break;
      case "entering":
        refuse(allWords || NO_REASON);
        break;
      case "leaving":
        if (isFollowed && !outbox.isSettled) {
          startOver(lastWords);
          break;
        }
        showLastWords(lastWords);
        finishLeaving(error === undefined);
        break;
      case "joined":
      case "catchingUp":
        startOver(lastWords);
        break;
      default:
        change({ at: "offline" });
    }
  }

  /** There will be no other connection, on which they could come again. */
  function showLastWords(lastWords: string[]): void {
    showPresent(isFollowed ? follower.finish() : lastWords.map(classify));
  }

  /** The connection is lost. What has not arrived is sent again, or its loss is told. */
  function startOver(lastWords: string[]): void {
    showPresent(isFollowed ? follower.lose() : lastWords.map(classify));
    keyring.handleLoss(outbox.change, name);
    const isRecent = isFollowed || outbox.lastSent > lastHeard - RECENT;
    const lost = outbox.handleLoss();
    if (lost > 0 && !screen.isPerson) isComplete = false;
    if (goal === "leave" && outbox.isSettled) {
      finishLeaving(false); // there is nothing to come back for
      return;
    }
    const words = isFollowed ? ASKED_IN_DOUBT : SAID_IN_DOUBT;
    fail(lost > 0 && isRecent ? `${LOST} ${words}` : LOST);
  }

  function refuse(refused: string): void {
    if (goal === "enter") {
      change({ at: "offline" });
      entered.resolve({ refused });
      return;
    }

    const isNeedless = NEEDS_NO_PASSWORD.test(refused) && keyring.passwordOf(name) !== undefined;
    const hasAnother = NEEDS_PASSWORD.test(refused) && keyring.tryAnother(name);
    if (isNeedless) keyring.forget();
    if (isNeedless || hasAnother) connect();
    else if (NEEDS_PASSWORD.test(refused) || BANNED.test(refused)) endStay(refused);
    else fail(refused); // it was ours a moment ago: the server has not noticed yet that we were gone
  }

  /**
   * Ends the stay for good: to try again would be of no use.
   * @param refused the words of the server, if they were not shown yet
   */
  function endStay(refused?: string): void {
    hangUp();
    isBanished = true;
    outbox.release();
    if (!hasArrived) {
      entered.resolve({ refused: refused ?? SENT_AWAY });
      return;
    }
    if (refused !== undefined) screen.notice(refused);
    if (goal === "leave") finishLeaving(false);
    else screen.endConversation();
  }

  function handleError({ code = "", message }: NodeJS.ErrnoException): void {
    const problem = PROBLEMS.find((problem) => problem.code.test(code));
    fail(`${unreachable} ${problem?.advice ?? message}`);
  }

  function failSilent(): void {
    if (state.at === "catchingUp") {
      if (isPaused)
        state.timer.refresh(); // it is we who do not listen: nobody reads our output
      else startOver([]);
      return;
    }
    const lines = state.at === "entering" ? split() : [];
    if (lines.length > 0) hearAnswer(lines);
    else fail(`${unreachable} It says nothing.${tls ? "" : " Try --tls."}`);
  }

  function fail(reason: string): void {
    hangUp();
    if (goal === "enter") {
      entered.reject(new Error(reason));
      return;
    }
    const seconds = Math.min(30, 2 ** tries) * (0.8 + Math.random() * 0.4);
    tries++;
    screen.notice(`${reason} Trying again in ${Math.round(seconds)} s.`);
    change({ at: "retrying", timer: setTimeout(connect, seconds * PACE.retry) });
  }

  function hangUp(): void {
    const socket = "socket" in state ? state.socket : undefined;
    change({ at: "offline" });
    socket?.end();
  }

  function waitForLastWords(): Timer {
    return setTimeout(giveUp, PACE.lastWords + outbox.cost * PACE.perLine);
  }

  /** The server has been silent for long, unless we do not listen. */
  function giveUp(): void {
    if (isPaused && state.at === "leaving") state.timer.refresh();
    else finishLeaving(false);
  }

  /**
   * All lines have arrived if a server of ours has confirmed them, or if another one closes in good order
   * after our FIN.
   */
  function finishLeaving(isOrderly: boolean): Farewell {
    hangUp();
    const { unsent, doubtful } = outbox;
    const hasArrived = doubtful === 0 || (isOrderly && !isFollowed);
    const farewell = { unsent, isComplete: isComplete && hasArrived };
    outbox.clear();
    isComplete = true;
    left.resolve(farewell);
    return farewell;
  }

  return {
    /** Whether the server has shown us out. */
    get isOver() {
      return isBanished;
    },

    /** Whether a password may be sent on this connection, or might have been on the last one. */
    get isSafe() {
      return isSafe();
    },

    /**
     * Enters under a name, with its password if it has one, or only connects. Resolves with `refused`, the
     * words of a refusal, if there is one.
     * @throws when there is no connection to be had; the message is for the user
     */
    join(wanted = "", password = ""): Promise<{ refused?: string }> {
      name = cleanText(wanted).trim().normalize("NFKC"); // as the server takes it
      keyring.begin(name, password);
      isBanished = false;
      hasArrived = false;
      goal = "enter";
      entered = Promise.withResolvers();
      follower = createFollower(outbox, recall);
      if (state.at === "lobby") introduce(state.socket);
      else connect();
      return entered.promise;
    },

    /** Sends a line as soon as possible. Resolves when nothing waits to be sent any more. */
    send(text: string): Promise<void> {
      if (isFollowed && /^\/since\b/i.test(text)) {
        screen.notice("The client does that itself.");
        return Promise.resolve();
      }
      if (hasPassword(text) && (!isSafe() || state.at !== "joined")) {
        screen.notice(state.at === "joined" ? UNSAFE : NOT_CONNECTED);
        if (!screen.isPerson) isComplete = false;
        return Promise.resolve();
      }
      const sent = outbox.add(text);
      flush();
      return sent;
    },

    /**
     * Sends what waits, half-closes, and reads until the server closes. Where the connection is lost
     * before all has arrived, makes it anew. Called again, waits no more.
     */
    leave(): Promise<Farewell> {
      const isIn = state.at === "joined" || state.at === "catchingUp";
      const isNeeded = isIn || (!screen.isPerson && !outbox.isSettled);
      const isEnd = goal === "leave" || isBanished || !isNeeded;
      if (isEnd) return Promise.resolve(finishLeaving(false));

      goal = "leave";
      left = Promise.withResolvers();
      if (state.at === "joined") stay(state.socket); // on the way out
      return left.promise;
    },
  };
}

// --- The editor --------------------------------------------------------------------------------

/** A line that was entered. One whose beginning was pasted is never a command. */
type Line = { text: string; from: "keyboard" | "paste" | "pipe" };

/** A line that is not entered yet. */
type Draft = { text: string; isPasted: boolean };

/** What a terminal sends for a key, as node:readline tells. */
type Key = { name?: string; ctrl?: boolean; meta?: boolean; shift?: boolean; sequence?: string };

type Editor = ReturnType<typeof createEditor>;

/** The line that is being typed, edited with the keys of readline(3), a grapheme cluster at a time. */
export function createEditor(offer: (before: string) => string[]) {
  let text = "";
  let cursor = 0;
  let isPasted = false; // its beginning was
  let killed: Draft = { text: "", isPasted: false }; // what Ctrl+Y brings back
  let completion: { offers: string[]; chosen: number; after: string } | null = null;

  const history: Draft[] = [];
  let place = 0; // in the history, or behind it
  let draft: Draft = { text: "", isPasted: false }; // what stands behind the history

  const textBefore = () => text.slice(0, cursor);
  const textAfter = () => text.slice(cursor);

  // Where the cursor may go.
  const left = () => cursor - (graphemes(textBefore()).at(-1)?.length ?? 0);
  const right = () => cursor + (graphemes(textAfter())[0]?.length ?? 0);
  const wordLeft = () => textBefore().search(/\S*\s*$/);
  const wordRight = () => cursor + (/^\s*\S*/.exec(textAfter())?.[0].length ?? 0);

  function edit(before: string, after: string): void {
    text = before + after;
    cursor = before.length;
    if (text === "") isPasted = false;
  }

  function insert(typed: string, pasted: boolean): void {
    completion = null;
    if (cursor === 0) isPasted = pasted;
    edit(textBefore() + typed, textAfter());
  }

  function moveTo(next: number): void {
    cursor = next;
  }

  /** Takes out what stands between the cursor and another place. */
  function erase(to: number): string {
    const begin = Math.min(cursor, to);
    const end = Math.max(cursor, to);
    const erased = text.slice(begin, end);
    edit(text.slice(0, begin), text.slice(end));
    return erased;
  }

  function kill(to: number): void {
    const isBeginning = Math.min(cursor, to) === 0;
    const wasPasted = isPasted && isBeginning;
    const isSecret = WITH_PASSWORD.test(text);
    const erased = erase(to);
    if (erased && !isSecret) killed = { text: erased, isPasted: wasPasted };
  }

  function recall(next: number): void {
    if (next < 0 || next > history.length || next === place) return;
    if (place === history.length) draft = { text, isPasted };
    place = next;
    const line = history[place] ?? draft;
    isPasted = line.isPasted;
    edit(line.text, "");
  }

  function choose(step: 1 | -1): void {
    completion ??= { offers: offer(textBefore()), chosen: step === 1 ? -1 : 0, after: textAfter() };
    const { offers } = completion;
    if (offers.length === 0) return;
    completion.chosen = (completion.chosen + step + offers.length) % offers.length;
    edit(offers[completion.chosen] ?? "", completion.after);
  }

  const keys: Record<string, () => void> = {
    left: () => moveTo(left()),
    right: () => moveTo(right()),
    home: () => moveTo(0),
    end: () => moveTo(text.length),
    "alt+b": () => moveTo(wordLeft()),
    "alt+f": () => moveTo(wordRight()),
    backspace: () => erase(left()),
    delete: () => erase(right()),
    "ctrl+w": () => kill(wordLeft()),
    "alt+d": () => kill(wordRight()),
    "ctrl+u": () => kill(0),
    "ctrl+k": () => kill(text.length),
    "ctrl+y": () => insert(killed.text, killed.isPasted),
    up: () => recall(place - 1),
    down: () => recall(place + 1),
    tab: () => choose(1),
    "shift+tab": () => choose(-1),
  };

  const otherKeys: Record<string, string> = {
    "ctrl+b": "left",
    "ctrl+f": "right",
    "ctrl+a": "home",
    "ctrl+e": "end",
    "ctrl+left": "alt+b",
    "alt+left": "alt+b",
    "ctrl+right": "alt+f",
    "alt+right": "alt+f",
    "ctrl+d": "delete",
    "alt+backspace": "ctrl+w",
    "alt+delete": "alt+d",
    "ctrl+p": "up",
    "ctrl+n": "down",
  };

  return {
    get text() {
      return text;
    },

    /** UTF-16 code units before the cursor. */
    get cursor() {
      return cursor;
    },

    insert,

    /** Does what a key is for, such as `ctrl+a`, if it is for anything. */
    press(key: string): void {
      const act = keys[otherKeys[key] ?? key];
      if (!key.endsWith("tab")) completion = null;
      act?.();
    },

    /** Takes the line away, and begins a new one. */
    enter(isRemembered: boolean): Draft {
      const line = { text, isPasted };
      if (isRemembered && text.trim() && text !== history.at(-1)?.text) history.push(line);
      if (history.length > MAX_TYPED_LINES) history.shift();
      place = history.length;
      completion = null;
      edit("", "");
      return line;
    },
  };
}

// --- The display -------------------------------------------------------------------------------
// Lines go up the terminal and stay. Below them stands the input: a line of status if there is one,
// and what is being typed, which is taken away and drawn again around whatever else is shown.

/** What stands at the bottom. */
type Input = { status: string; prompt: string; text: string; cursor: number };

type Display = {
  /** Shows lines, each with its newline, above the input. */
  print(lines: string): void;
  draw(input: Input): void;
  /** Somebody else has written to the terminal: what was drawn is not where it was. */
  reset(): void;
};

/**
 * Writes to a file descriptor, and knows how much of it waits to be taken. Unlike process.stdout, it
 * never blocks, even when nobody reads the terminal (Ctrl+S, a hung window).
 */
function createOutput(fd: number) {
  const isTerminal = isatty(fd);
  let waiting = "";
  let isWriting = false;
  let callbacks: (() => void)[] = [];

  function writeNext(): void {
    isWriting = waiting !== "";
    if (isWriting) {
      const bytes = Buffer.from(waiting);
      waiting = "";
      writeBytes(bytes);
      return;
    }

    const due = callbacks;
    callbacks = [];
    for (const callback of due) callback();
  }

  function writeBytes(bytes: Uint8Array): void {
    write(fd, bytes, (error, written) => {
      if (error?.code === "EAGAIN") setTimeout(writeBytes, 10, bytes);
      else if (error) handleError(error);
      else if (written < bytes.length) writeBytes(bytes.subarray(written));
      else writeNext();
    });
  }

  function handleError({ code, message }: NodeJS.ErrnoException): void {
    const isGone = code === "EPIPE" || code === "EIO"; // nobody reads any more
    if (!isGone && fd === stdout.fd) writeSync(process.stderr.fd, `${message}\n`);
    process.exit(1);
  }

  return {
    write(text: string): void {
      waiting += isTerminal ? encode(text) : text;
      if (!isWriting) writeNext();
    },

    isFull: () => waiting.length > MAX_OUTPUT,
    isEmpty: () => !isWriting,

    /** Calls back when all has been taken. */
    whenTaken(callback: () => void): void {
      callbacks.push(callback);
      if (!isWriting) writeNext();
    },
  };
}

const output = createOutput(stdout.fd);
const errors = createOutput(process.stderr.fd);

const size = () => ({ columns: stdout.columns || 80, rows: stdout.rows || 24 });

type Rows = { rows: string[]; row: number; before: string }; // the cursor is behind `before` of `row`

/** Cuts a text into rows, and finds the row of the cursor and what stands before it there. */
export function cutRows(text: string, cursor: number, columns: number): Rows {
  const rows: string[] = [];
  let row = "";
  let width = 0;
  let length = 0;
  let place: { row: number; before: string } | null = null;

  for (const grapheme of graphemes(text)) {
    const columnsTaken = Bun.stringWidth(grapheme);
    if (width + columnsTaken > columns) {
      rows.push(row);
      row = "";
      width = 0;
    }
    if (length >= cursor) place ??= { row: rows.length, before: row };
    row += grapheme;
    width += columnsTaken;
    length += grapheme.length;
  }

  if (width >= columns && !place) {
    rows.push(row); // the cursor does not fit behind it
    row = "";
  }
  rows.push(row);
  return { rows, ...(place ?? { row: rows.length - 1, before: row }) };
}

/** A display that redraws the input in place (ECMA-48; DEC private modes 7 and 2004). */
function createDisplay(): Display {
  const NOTHING = { rows: [""], row: 0, before: "" };
  let drawn: Rows = NOTHING;
  let input: Input = { status: "", prompt: "", text: "", cursor: 0 };

  /** Goes to the beginning of the input and clears all below. A narrower window has cut its rows. */
  function erase(): string {
    const { columns } = size();
    const { rows, row, before } = drawn;
    let up = Math.floor(Bun.stringWidth(before) / columns);
    for (const above of rows.slice(0, row))
      up += Math.max(1, Math.ceil(Bun.stringWidth(above) / columns));

    // Not from the first column: tmux would push a whole window that is cleared into its scrollback.
    return `${up > 0 ? `\x1b[${up}A` : ""}\r\x1b[K\x1b[C\x1b[J\r`;
  }

  /** The rows of the input, but no more than the window has: those around the cursor. */
  function cutInput(): Rows {
    const { columns, rows: height } = size();
    const { status, prompt, text, cursor } = input;
    const shown = (prompt + text).replaceAll("\t", " ");
    const { rows, row, before } = cutRows(shown, prompt.length + cursor, columns);
    const top = status ? [graphemes(status).slice(0, columns).join("")] : [];
    const space = Math.max(1, height - 1 - top.length);
    const first = Math.max(0, row - space + 1);
    return {
      rows: [...top, ...rows.slice(first, first + space)],
      row: row - first + top.length,
      before,
    };
  }

  /** Without wrapping, so that a row stays one, however wide the terminal takes a character to be. */
  function redraw(): string {
    drawn = cutInput();
    const up = drawn.rows.length - 1 - drawn.row;
    const back = `${up > 0 ? `\x1b[${up}A` : ""}\r${drawn.before}`;
    return `\x1b[?7l${drawn.rows.join("\r\n")}${back}\x1b[?7h`;
  }

  return {
    print: (lines) => output.write(erase() + lines + redraw()),
    draw(next) {
      input = next;
      output.write(erase() + redraw());
    },
    reset: () => (drawn = NOTHING),
  };
}

/** A display for a terminal without escape codes: what is typed is written again below the lines. */
function createPlainDisplay(): Display {
  let drawn = "";

  return {
    print(lines) {
      output.write(`${drawn && "\n"}${lines}${drawn}`);
    },
    draw({ prompt, text }) {
      const next = prompt + text;
      if (next === drawn) return;
      if (next.startsWith(drawn)) output.write(next.slice(drawn.length));
      else output.write(`\n${next}`);
      drawn = next;
    },
    reset: () => (drawn = ""),
  };
}

// --- The screens -------------------------------------------------------------------------------

/** Where the conversation takes place: a person's terminal, or a pipe. */
type Screen = {
  isPerson: boolean;
  /** Resolves with the next line entered, or undefined at the end of input or of the conversation. */
  ask(question: string): Promise<Line | undefined>;
  /** Resolves with a password, which is not shown and kept nowhere; undefined if there is none. */
  askPassword(question: string): Promise<string | undefined>;
  /** Lines that were entered and not asked for yet. */
  waiting(): number;
  /** Shows what the room says. @returns false if no more should come until `whenTaken` calls back */
  show(entries: Entry[], reader: string): boolean;
  whenTaken(callback: () => void): void;
  /** Shows the roster, which only a newcomer gets. */
  showRoster(entry: Entry): void;
  /** Shows a line that goes to the room now. */
  showOwn(text: string): void;
  /** Shows what the client itself has to say. */
  notice(text: string): void;
  /** Shows a text as it is. */
  print(text: string): void;
  /** Drops what was entered, and answers the question of the moment, or the next one, with undefined. */
  endConversation(): void;
  /** Hides somebody's lines, or shows them again; without a name says whose are hidden. */
  ignore(name: string): void;
  close(): void;
};

let life: "running" | "suspended" | "ending" = "running";

const SAY = "You: ";
const CTRL_C = 3;
const NO_INPUT: Input = { status: "", prompt: "", text: "", cursor: 0 };

/** A person's terminal: the line being typed and, above it, all that happens. */
function openTerminal(bell: string): Screen {
  const display = IS_PLAIN ? createPlainDisplay() : createDisplay();
  const view = createView(display, bell);
  const keyboard = createKeyboard(display, view);

  return {
    ...view,
    isPerson: true,
    ask: keyboard.ask,
    askPassword: keyboard.askPassword,
    endConversation: keyboard.endConversation,
    waiting: keyboard.waiting,
    whenTaken: output.whenTaken,
    close() {
      keyboard.close();
      view.print("");
      display.draw(NO_INPUT);
    },
  };
}

type View = ReturnType<typeof createView>;

/** What is shown above the input. It knows the people here, and the ones that are ignored. */
function createView(display: Display, bell: string) {
  const people: People = new Map();
  const ignored = new Set<string>();
  let reader = "";
  let crowd: Crowd | null = null;
  let crowdTimer: Timer | undefined;

  /** Shows lines of ours, behind those of the room. */
  function printLines(lines: string): void {
    display.print(takeCrowd() + lines);
  }

  function notice(text: string): void {
    printLines(layOut("", text, NOTICE, size().columns));
  }

  function findIgnored(name: string): string | undefined {
    return [...ignored].find((other) => isSameName(other, name));
  }

  /** An ignored person stays ignored under another name. */
  function followRename({ who, renamed }: Entry): void {
    const before = who && findIgnored(who);
    if (!before || !renamed) return;
    ignored.delete(before);
    ignored.add(copyOf(renamed));
  }

  function isShown({ from }: Entry): boolean {
    return !from || isSameName(from, reader) || findIgnored(from) === undefined;
  }

  /** The line about the latest arrivals or departures, if there are any. */
  function takeCrowd(): string {
    clearTimeout(crowdTimer);
    const entry = crowd && entryOf(crowd);
    crowd = null;
    return entry ? layOutEntry(entry, reader, size().columns, "") : "";
  }

  /** Adds somebody to the crowd. Returns the line of the crowd before, if that did something else. */
  function joinCrowd(entry: Entry): string {
    const { who = "", did = "" } = entry;
    const isSameCrowd = crowd?.did === did && minuteOf(crowd.first) === minuteOf(entry);
    const before = isSameCrowd ? "" : takeCrowd();
    if (!crowd) {
      crowd = { did, names: [], count: 0, first: entry };
      crowdTimer = setTimeout(printLines, PACE.crowd, "");
    }
    crowd.count++;
    if (crowd.names.length < 3) crowd.names.push(copyOf(who));
    return before;
  }

  return {
    notice,

    /** The names of the others, the latest speakers last. */
    others: () => bySpeech(people).filter((name) => name !== reader),

    /** Shows what the room says. @returns whether more may come at once */
    show(entries: Entry[], name: string): boolean {
      reader = name;
      const { columns } = size();
      let lines = "";
      for (const entry of entries) {
        if (!entry.isRecalled) {
          remember(people, entry);
          followRename(entry);
        }
        if (!isShown(entry)) continue;
        if (isCrowded(entry)) lines += joinCrowd(entry);
        else lines += takeCrowd() + layOutEntry(entry, reader, columns, bell);
      }
      if (lines) display.print(lines);
      return !output.isFull();
    },

    showRoster(entry: Entry): void {
      const { columns } = size();
      remember(people, entry);
      printLines(layOutEntry({ text: shortenRoster(entry, columns) }, reader, columns, ""));
    },

    showOwn(text: string): void {
      printLines(layOut(SAY, text, OWN, size().columns));
    },

    print(text: string): void {
      printLines(text && `${text}\n`);
    },

    ignore(name: string): void {
      const known = findIgnored(name);
      if (name === "") {
        const names = [...ignored].join(", ");
        notice(names ? `Hidden: ${names}` : "Nobody is hidden.");
      } else if (known === undefined) {
        ignored.add(name);
        notice(`What ${name} says is hidden from now on. /ignore ${name} shows it again.`);
      } else {
        ignored.delete(known);
        notice(`What ${known} says is shown again.`);
      }
    },
  };
}

/** What the person types, as lines to be asked for. */
function createKeyboard(display: Display, view: View) {
  const lineEditor = createEditor((before) => complete(before, view.others()));
  let password: { editor: Editor; answer: (typed?: string) => void } | null = null; // being typed
  const entered: Line[] = []; // but not yet asked for
  let isOut = false; // we were shown out, and nobody has asked since
  let input: "typing" | "pasting" | "dropping" | "ended" = "typing"; // the rest of a paste, or all
  let isUnseen = false; // what is typed between a password and the next question: it may be one, too
  let question = "";
  let wake = () => {};
  let blankLine: Timer | undefined; // one that ends the program, unless more input follows
  let redraw: ReturnType<typeof setImmediate> | undefined;

  function draw(): void {
    redraw = undefined;
    const waiting = entered.filter(({ from }) => from === "paste").length;
    const status = `${waiting} lines are on their way at the pace of the room; Ctrl+C stops them.`;
    if (isUnseen) {
      display.draw({ ...NO_INPUT, prompt: question });
      return;
    }
    const { text, cursor } = lineEditor;
    display.draw({
      status: waiting > SHORT_PASTE ? status : "",
      prompt: question,
      text: hidePassword(text),
      cursor,
    });
  }

  /** What keys go to. */
  function editor(): Editor {
    return password?.editor ?? lineEditor;
  }

  /** Draws what was typed, once for all keys of a chunk. */
  function scheduleDraw(): void {
    redraw ??= setImmediate(draw);
  }

  // Bun may believe the terminal raw, when a shell has changed it in the meantime.
  function resume(): void {
    life = "running";
    stdin.setRawMode(false);
    setRaw(true);
    display.reset();
    draw();
  }

  function suspend(): void {
    clearImmediate(redraw);
    redraw = undefined;
    display.draw(NO_INPUT);
    output.whenTaken(() => {
      setRaw(false);
      life = "suspended";
      process.kill(0, "SIGTSTP");
      setTimeout(() => stdin.isRaw || resume(), 100); // where no shell is, nothing stops or continues
    });
  }

  function clear(): void {
    if (IS_PLAIN) return;
    output.write("\x1b[H\x1b[2J");
    display.reset();
  }

  function enter(line: Line): void {
    entered.push(line);
    wake();
  }

  function enterTyped(): void {
    if (password) {
      const isCancelled = password.editor.text === "";
      if (!isCancelled || input === "typing") answerPassword(password.editor.text);
      return;
    }

    const isRemembered = question === SAY && !WITH_PASSWORD.test(lineEditor.text);
    const { text, isPasted } = lineEditor.enter(isRemembered);
    const from = isPasted || input === "pasting" ? "paste" : "keyboard";
    const line: Line = { text, from };
    if (from === "paste" && question === SAY && text.trim() === "") return;
    if (text === "" && from === "keyboard") blankLine = setTimeout(enter, PACE.blank, line);
    else enter(line);
  }

  /** Lines that nobody has asked for. */
  function countWaiting(): number {
    return entered.filter(({ text }) => text.trim()).length;
  }

  /** What was entered so far is not sent. */
  function dropEntered(): void {
    const unsent = countWaiting();
    entered.length = 0;
    if (unsent > 0) view.notice(`${linesWere(unsent)} not sent.`);
  }

  /** Drops what may be a password, because it was typed when one was asked for, or just before. */
  function dropUnseen(): void {
    dropEntered();
    lineEditor.enter(false);
    isUnseen = false;
  }

  /** Ends the question for a password. */
  function answerPassword(typed?: string): void {
    if (!password) return;
    const { answer } = password;
    password = null;
    isUnseen = true;
    view.print(question);
    question = "";
    draw();
    answer(typed);
  }

  function endInput(): void {
    input = "ended";
    answerPassword();
    wake();
  }

  /** Ctrl+C drops the pasted lines that wait. Without any it ends the program. */
  function interrupt(): void {
    const typed = entered.filter(({ from }) => from !== "paste");
    const stopped = entered.length - typed.length;
    entered.splice(0, entered.length, ...typed);
    if (stopped > 0) view.notice(`${linesWere(stopped)} not sent.`);
    else process.emit("SIGINT", "SIGINT");
  }

  /** Where the end marker of a paste is lost, Ctrl+C must still work. */
  function watchPaste(chunk: Uint8Array): void {
    const isInPaste = input === "pasting" || input === "dropping";
    if (!isInPaste || chunk.length !== 1 || chunk[0] !== CTRL_C) return;
    input = "typing";
    interrupt();
  }

  function insert(typed: string): void {
    const { length } = editor().text;
    if (length >= MAX_TYPED) return;
    editor().insert(typed, input === "pasting");
    if (editor().text.length >= MAX_TYPED)
      view.notice(`A line takes ${MAX_TYPED} characters. What follows is left out.`);
  }

  const keys: Record<string, () => void> = {
    return: enterTyped,
    enter: enterTyped,
    "ctrl+c": interrupt,
    "ctrl+d": () => (editor().text === "" ? endInput() : editor().press("delete")),
    "ctrl+z": suspend,
    "ctrl+l": clear,
    "paste-start": () => (input = "pasting"),
    "paste-end": () => (input = "typing"),
  };
  const keysInPaste = ["return", "enter", "paste-end"];

  function handleKey(typed: string | undefined, key: Key): void {
    clearTimeout(blankLine);
    const { name = "", ctrl, meta, shift } = key;
    const modifiers = `${ctrl ? "ctrl+" : ""}${meta ? "alt+" : ""}`;
    const id = `${modifiers}${shift && name.length > 1 ? "shift+" : ""}${name}`;
    if (input === "ended") {
      if (id === "ctrl+c") interrupt();
      return;
    }

    if (input === "dropping" && name !== "paste-end") return;

    const text = typed === undefined || ctrl || meta ? "" : cleanText(typed);
    const isLiteral = text !== "" && (name !== "tab" || input === "pasting");
    if (isLiteral) insert(text);
    else if (input === "typing" || keysInPaste.includes(name))
      (keys[id] ?? (() => editor().press(id)))();
    if (id !== "ctrl+z") scheduleDraw();
  }

  emitKeypressEvents(stdin);
  stdin.on("keypress", handleKey).on("data", watchPaste).on("end", endInput).on("error", endInput);
  stdout.on("resize", scheduleDraw);
  // A signal that ends us may come with it, and then the terminal belongs to the shell.
  process.on("SIGCONT", () => setImmediate(() => life !== "ending" && resume()));
  process.on("exit", restoreTerminal);
  setRaw(true);

  return {
    /** Resolves with the next line entered, or undefined at the end of input or of the conversation. */
    async ask(asked: string): Promise<Line | undefined> {
      if (isUnseen) dropUnseen();
      question = asked;
      draw();
      while (entered.length === 0 && input !== "ended" && !isOut)
        await new Promise<void>((resolve) => (wake = resolve));
      if (isOut) {
        isOut = false;
        return undefined;
      }
      const line = entered.shift();
      if (asked === SAY) return line;

      question = "";
      if (line) view.print(`${asked}${hidePassword(line.text)}`);
      draw();
      return line;
    },

    /**
     * Resolves with what is typed next, unseen; undefined at the end of input. What was typed before may
     * have been the password already, so it must not be taken for a message.
     */
    async askPassword(asked: string): Promise<string | undefined> {
      if (input === "ended") return undefined;
      dropUnseen();
      const { promise, resolve } = Promise.withResolvers<string | undefined>();
      password = { editor: createEditor(() => []), answer: resolve };
      question = asked;
      draw();
      return promise;
    },

    /**
     * We were shown out: what waits cannot be sent any more, nor what is being pasted. A password that is
     * being typed is typed to its end, unseen.
     */
    endConversation(): void {
      dropEntered();
      lineEditor.enter(!WITH_PASSWORD.test(lineEditor.text)); // Up brings it back
      if (input === "pasting") input = "dropping";
      isOut = true;
      wake();
      scheduleDraw();
    },

    waiting: countWaiting,

    close(): void {
      clearTimeout(blankLine);
      clearImmediate(redraw);
    },
  };
}

/** Raw mode, and bracketed paste (DEC private mode 2004). */
function setRaw(isOn: boolean): void {
  if (stdin.isRaw !== isOn) stdin.setRawMode(isOn);
  if (IS_PLAIN) return;
  try {
    writeSync(stdout.fd, isOn ? "\x1b[?2004h" : "\x1b[?2004l\x1b[?7h");
  } catch {} // the terminal is gone
}

/** With each way out the terminal is as it was. */
function restoreTerminal(): void {
  if (output.isEmpty()) {
    setRaw(false);
    return;
  }
  // It takes no output, so this would block for ever: let somebody else wait for it.
  const streams = { stdin: "inherit", stdout: "inherit", stderr: "ignore" } as const;
  Bun.spawn(
    ["sh", "-c", "trap '' TTOU; stty sane; printf '\\033[?2004l\\033[?7h'"],
    streams,
  ).unref();
}

/** The standard input and output of a tool. */
function openPipe(): Screen {
  const lines = readPipe();
  let hasEnded = false; // the conversation, because we were shown out
  let answer: (line: undefined) => void = () => {}; // to the last question

  async function nextLine(): Promise<Line | undefined> {
    const { done, value } = await lines.next();
    return done ? undefined : { text: value, from: "pipe" };
  }

  // A terminal would break long lines itself, at the left, where real lines begin.
  function layOutPlain(entry: Entry): string {
    if (stdout.isTTY) return layOutEntry(entry, "", size().columns, "");
    const { text, isRecalled, at = 0 } = entry;
    return isRecalled ? `* ${formatDate(at)} ${text}\n` : `${text}\n`;
  }

  function show(entries: Entry[]): void {
    output.write(entries.map(layOutPlain).join(""));
  }

  return {
    isPerson: false,
    ask() {
      if (hasEnded) return Promise.resolve(undefined);
      const { promise, resolve, reject } = Promise.withResolvers<Line | undefined>();
      answer = resolve;
      nextLine().then(resolve, reject);
      return promise;
    },
    askPassword: async () => process.env["CHAT_PASSWORD"],
    endConversation() {
      hasEnded = true;
      answer(undefined);
    },
    show(entries) {
      show(entries);
      return !output.isFull();
    },
    waiting: () => 0, // more than anybody knows
    whenTaken: output.whenTaken,
    showRoster: (entry) => show([entry]),
    showOwn() {},
    notice: (text) => errors.write(`${text}\n`),
    print() {},
    ignore() {},
    close() {},
  };
}

async function* readPipe(): AsyncGenerator<string, void> {
  const split = splitLines(MAX_LINE);
  for await (const chunk of Bun.stdin.stream()) {
    const lines = split(chunk);
    if (lines.some(({ length }) => length === MAX_LINE))
      errors.write(`A line was longer than ${MAX_LINE} characters and was cut.\n`);
    yield* lines;
  }
  yield* split();
}

// --- The conversation --------------------------------------------------------------------------

const MENU = "1. Join the chat\nq. Leave the chat\n2. Exit the program";
const WHO = "Enter your username: ";
const PATIENCE = "Waiting for the server to take the last lines. Ctrl+C ends at once.";
const NO_BLANKS = "A name has no blanks. Its password is asked for.";
const UNSAFE_NAME =
  "The name is registered. A password is sent only to a server of bun-chat, and under TLS or to this machine.";
const PROOF = "Waiting for the server to answer. Ctrl+C ends at once.";
const WRONG_PASSWORD = "The password is wrong.";
const NO_PASSWORD =
  "The name is registered: give its password in the environment, as CHAT_PASSWORD.";
const NOT_A_COMMAND =
  "That was not sent, because it may hold a password. A command is typed, and begins with the slash.";
const HELP = `Here also: /ignore NAME, and q, which leaves the chat. See bun client.ts --help.`;

function linesWere(count: number): string {
  return count === 1 ? "1 line was" : `${count} lines were`;
}

/** Shows the menu until a choice is made. Resolves with the name to join under, or "" to end. */
export async function menu(screen: Screen): Promise<string> {
  for (;;) {
    screen.print(MENU);
    const line = await screen.ask("Enter your choice: ");
    const choice = line?.text.trim().toLowerCase() ?? "/quit";

    // A paste must not end the program, whatever it holds.
    if (line?.from !== "paste" && ["", "2", "/quit"].includes(choice)) {
      screen.print("Exiting the program.");
      return "";
    }
    if (line?.from !== "paste" && choice === "q") {
      screen.print("Disconnecting from the server...");
      return "";
    }
    const name = choice === "1" ? await askName(screen) : "";
    if (name) return name;
    if (choice !== "1" && choice !== "") screen.print("Invalid choice. Try again.");
  }
}

async function askName(screen: Screen): Promise<string> {
  for (;;) {
    const line = await screen.ask(WHO);
    const name = line?.text.trim() ?? "";
    if (!/\s/.test(name)) return name;
    if (!screen.isPerson) throw new Error(NO_BLANKS);
    screen.notice(NO_BLANKS);
  }
}

/** Asks for a new password, which is typed twice because nobody sees it. */
async function askNewPassword(screen: Screen): Promise<string | undefined> {
  const password = await screen.askPassword("New password: ");
  if (!password) return undefined;
  const again = await screen.askPassword("Once more: ");
  if (password === again) return password;
  screen.notice("The two passwords differ. Nothing was changed.");
  return undefined;
}

/** Sends what is entered, until somebody wants to go: back to the menu, or home. */
export async function sendMessages(screen: Screen, room: Room): Promise<"menu" | "end" | "out"> {
  const waitForTurn = createPacer();
  for (;;) {
    const line = await screen.ask(SAY);
    if (!line) return room.isOver ? "out" : "end";
    const { text, from } = line;
    const [word = "", ...rest] = text.trim().split(/\s+/);
    const command = from !== "paste" && text.startsWith("/") ? word.toLowerCase() : "";

    if (from === "keyboard" && text === "") return "end";
    if (from === "keyboard" && text.toLowerCase() === "q") return "menu";
    if (command === "/quit") return "end";
    if (command === "/ignore" && screen.isPerson) {
      screen.ignore(rest.join(" ").replace(/^@|:$/g, ""));
      continue;
    }
    if (word === "") continue;
    if (screen.isPerson && (await handlePassword(screen, room, command, text))) continue;

    screen.showOwn(hidePassword(text));
    const sent = room.send(from === "paste" && text.startsWith("/") ? `/${text}` : text);
    if (!screen.isPerson) await sent; // a tool has time, a person types on
    if (command === "/help") screen.notice(HELP);
    if (from === "paste") await waitForTurn();
  }
}

/**
 * Asks for the new password of a command that has none, and lets none be said to everybody.
 * @returns whether the line is not to be sent
 */
async function handlePassword(screen: Screen, room: Room, command: string, text: string) {
  const isSaid = command === "" && WITH_PASSWORD.test(text);
  if (isSaid) screen.notice(NOT_A_COMMAND);

  const isAsked = /^\/(?:register|password)\s*$/i.test(text) && command !== "";
  if (isAsked) await setPassword(screen, room, command);
  return isSaid || isAsked;
}

/** Sends a command with a new password. */
async function setPassword(screen: Screen, room: Room, command: string): Promise<void> {
  if (!room.isSafe) {
    screen.notice(UNSAFE);
    return;
  }
  const password = await askNewPassword(screen);
  if (password) void room.send(`${command} ${password}`);
}

/** Returns a function that waits until one more pasted line may go. Rooms take them no faster. */
function createPacer(): () => Promise<void> {
  let due = -Infinity; // ms

  return async () => {
    const now = performance.now();
    due = Math.max(due, now - (PASTED_AT_ONCE - 1) * PACE.pasted) + PACE.pasted;
    if (due > now) await Bun.sleep(due - now);
  };
}

/** What has become of the lines, if it is not good. In a pipe more of them may have come behind. */
function describe({ unsent, isComplete }: Farewell, isPerson: boolean): string {
  const more = isPerson ? "" : ", nor was anything after them";
  if (unsent > 0) return `${linesWere(unsent)} not sent${more}.`;
  return isComplete ? "" : "The last lines may be lost.";
}

/** A person's way through the menu and the room. Resolves with the exit code. */
async function chat(screen: Screen, room: Room, givenName: string): Promise<number> {
  await room.join();
  screen.notice("Connected to server.");

  let name = givenName || (await menu(screen));
  while (name) {
    screen.notice(`Joining the chat as ${name}...`);
    const problem = await tryToJoin(screen, room, name);
    if (problem) {
      screen.notice(problem.words);
      const another = problem.isRefusal ? await askName(screen) : "";
      name = another || (await menu(screen));
      continue;
    }

    const next = await sendMessages(screen, room);
    if (next === "menu") screen.notice("Leaving the chat...");
    const patience = setTimeout(() => screen.notice(PATIENCE), PACE.patience);
    const words = describe(await room.leave(), screen.isPerson);
    clearTimeout(patience);
    if (words) screen.notice(words);
    if (next === "end") return words ? 1 : 0;
    screen.notice("Connection closed.");
    name = await menu(screen);
  }
  await room.leave();
  return 0;
}

/** Joins. Resolves with what went wrong, if anything did. */
async function tryToJoin(screen: Screen, room: Room, name: string) {
  try {
    const refused = await joinAs(screen, room, name);
    return refused === undefined ? null : { words: refused, isRefusal: true };
  } catch (error) {
    return { words: messageOf(error), isRefusal: false };
  }
}

/**
 * Joins, with a password if the name has one. Resolves with the words of a refusal, if there is one.
 * @throws when there is no connection to be had
 */
async function joinAs(screen: Screen, room: Room, name: string): Promise<string | undefined> {
  let password = "";
  for (;;) {
    const patience = setTimeout(() => screen.notice(PROOF), PACE.patience);
    const { refused } = await room.join(name, password).finally(() => clearTimeout(patience));
    if (refused === undefined || !NEEDS_PASSWORD.test(refused)) return refused;
    if (!room.isSafe) return UNSAFE_NAME;

    if (password && !screen.isPerson) return WRONG_PASSWORD;
    if (password) screen.notice(WRONG_PASSWORD);
    password = (await screen.askPassword(`Password for ${name}: `)) ?? "";
    if (password.trim() === "") return screen.isPerson ? refused : NO_PASSWORD;
  }
}

/** The way of a pipe. Resolves with the exit code. @throws when it cannot get into the room */
async function passOn(screen: Screen, room: Room, givenName: string): Promise<number> {
  await room.join();
  const name = givenName || (await askName(screen));
  if (!name) throw new Error("A name is needed: the first line, or --name.");
  const refused = await joinAs(screen, room, name);
  if (refused !== undefined) throw new Error(refused);

  const next = await sendMessages(screen, room);
  const farewell = describe(await room.leave(), screen.isPerson);
  const words = farewell || (next === "out" ? SENT_AWAY : "");
  if (words) screen.notice(words);
  return words ? 1 : 0;
}

// --- The program -------------------------------------------------------------------------------

const USAGE = `Usage: bun client.ts [options]

Talk to everybody in a room, from your terminal.

  --host HOST     where the server is (${DEFAULTS.host})
  --port PORT     and its port (${DEFAULTS.port})
  --name NAME     join as NAME at once, without the menu
  --tls           encrypt; the certificate must be good for HOST
  --ca FILE       the same, for a certificate that this PEM file vouches for
  --history N     first show the last N lines, up to ${MAX_RECALL} (${DEFAULTS.recall}; in a pipe 0)
  --bell          ring when somebody mentions you or writes to you alone
  --help          show this text
  --version       show the version

In the chat:
${COMMANDS.map(({ name, parameters, help }) => `  ${`${name} ${parameters}`.padEnd(15)} ${help}`).join("\n")}
  //TEXT          say /TEXT, for a message that begins with a slash
  q               leave the chat, back to the menu
  Tab, Shift+Tab  complete a name or a command; once more for the next one
  Up, Down        what you said before
  Enter           on an empty line: end the program, as do Ctrl+D and Ctrl+C

In a pipe there is no menu, and without --name the first line is the name. There, the password of a
registered name is taken from CHAT_PASSWORD. NO_COLOR=1 is honoured.

Examples:
  bun client.ts --name Alex
  bun client.ts --host chat.example.org --port 6000 --bell
  tail -f app.log | bun client.ts --name logbot > room.txt`;

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** The program: menu or pipe, join, talk, leave, and every way out. */
export async function main(): Promise<void> {
  const { name, bell, history, ...address } = readOptions();
  const isPerson = stdin.isTTY && stdout.isTTY;
  const screen = isPerson ? openTerminal(bell ? "\x07" : "") : openPipe();
  const recall = history ?? (isPerson ? DEFAULTS.recall : 0);
  const room = receiveMessages(address, screen, recall);

  function finish(exitCode: number, words = ""): void {
    screen.close();
    output.whenTaken(() => {
      if (words) errors.write(`${words}\n`); // only now, so that it stands below all else
      errors.whenTaken(() => process.exit(exitCode));
    });
  }

  function endBySignal(signal: NodeJS.Signals, exitCode: number): void {
    if (life === "suspended") {
      // The terminal is the shell's: to touch it now would stop us again.
      process.removeAllListeners(signal);
      process.kill(process.pid, signal);
      return;
    }
    life = "ending";

    // What was typed before comes first. But a server may take nothing, and nobody may read stdout.
    setImmediate(async () => {
      const farewell = await room.leave();
      farewell.unsent += screen.waiting();
      finish(exitCode, describe(farewell, isPerson));
    });
    setTimeout(() => void room.leave(), PACE.signal);
    setTimeout(process.exit, PACE.exit, exitCode);
  }

  process.on("SIGINT", () => endBySignal("SIGINT", isPerson ? 0 : 130));
  process.on("SIGTERM", () => endBySignal("SIGTERM", 143));
  if (isPerson) process.on("SIGHUP", () => endBySignal("SIGHUP", 129));
  process.on("uncaughtException", (error) => finish(1, messageOf(error)));

  try {
    const converse = isPerson ? chat : passOn;
    finish(await converse(screen, room, name));
  } catch (error) {
    finish(1, messageOf(error));
  }
}

/** The options that were typed. Shows the help or the version, and ends, when they ask for it. */
function readOptions() {
  try {
    const { help, version, history, port, tls, ca, ...options } = parseOptions();
    if (help || version) {
      console.log(help ? USAGE : `bun-chat ${VERSION}`);
      process.exit(0);
    }

    const trust = ca === undefined ? (tls ?? false) : { ca: readAuthority(ca) };
    const { host = DEFAULTS.host, bell } = options;
    const name = options.name?.trim() ?? "";
    if (/\s/.test(name)) throw new TypeError("--name takes a name without blanks");
    return {
      host,
      port: readNumber("port", port, 1, 65_535) ?? DEFAULTS.port,
      name,
      bell,
      history: readNumber("history", history, 0, MAX_RECALL),
      tls: trust,
    };
  } catch (error) {
    const isUsage = error instanceof TypeError;
    const [what] = messageOf(error).split(/\. |\.\n/);
    console.error(isUsage ? `${what}. Try --help.` : messageOf(error));
    process.exit(isUsage ? 2 : 1);
  }
}

/** @throws TypeError on bad options; its message is for the user */
function parseOptions() {
  return parseArgs({
    options: {
      host: { type: "string" },
      port: { type: "string" },
      name: { type: "string" },
      tls: { type: "boolean" },
      ca: { type: "string" },
      history: { type: "string" },
      bell: { type: "boolean" },
      help: { type: "boolean" },
      version: { type: "boolean" },
    },
  }).values;
}

function readNumber(name: string, text: string | undefined, least: number, most: number) {
  if (text === undefined) return undefined;
  const number = /^\d+$/.test(text) ? Number(text) : NaN;
  if (number >= least && number <= most) return number;
  throw new TypeError(
    `--${name} takes a number from ${least} to ${most}, not ${JSON.stringify(text)}`,
  );
}

/** The certificates in a PEM file. @throws when it cannot be read, or holds none */
function readAuthority(file: string): string {
  let pem = "";
  try {
    pem = readFileSync(file, "utf8");
  } catch {
    throw new Error(`${file} cannot be read.`);
  }
  try {
    new X509Certificate(pem);
  } catch {
    throw new Error(`${file} holds no certificate in PEM.`);
  }
  return pem;
}

if (import.meta.main) void main();
