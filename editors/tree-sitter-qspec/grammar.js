/**
 * @file The language of quantizers, described in docs/language.md.
 * @license MIT OR Apache-2.0
 */

/// <reference types="tree-sitter-cli/dsl" />
// @ts-check

// Higher binds more tightly.
const PREC = { if: 0, compare: 1, or: 2, xor: 3, and: 4, shift: 5, sum: 6, product: 7, sign: 8, power: 9, postfix: 10 };

const separated = (rule) => optional(seq(rule, repeat(seq(",", rule)), optional(",")));

module.exports = grammar({
  name: "qspec",

  word: ($) => $.name,

  extras: ($) => [/\s/, "\u{feff}", $.doc_comment, $.comment],

  rules: {
    file: ($) => repeat($._item),

    _item: ($) => choice($.use, $.family, $.quantizer, $.fusion, $.function, $.layout),

    use: ($) => seq("use", choice(field("path", $.string), field("library", $.name))),

    family: ($) => seq("family", field("name", $.name), $.parameters, $.body),

    quantizer: ($) => seq("quantizer", field("name", $.name), choice($.body, seq("=", $.member))),

    member: ($) => seq(field("family", $.name), "(", separated($._expression), ")"),

    function: ($) => seq("function", field("name", $.name), $.parameters, $.block),

    parameters: ($) => seq("(", separated($.name), ")"),

    body: ($) => seq("{", repeat($._property), "}"),

    _property: ($) =>
      choice(
        $.let,
        $.simple_property,
        $.rectangle_property,
        $.bits_property,
        $.values_property,
        $.table,
        $.field,
        $.computed,
        $.choice_property,
        $.steps_property,
        $.code,
      ),

    let: ($) => seq("let", field("name", $.name), "=", field("value", $._expression)),

    simple_property: ($) => seq(choice("window", "vector", "step", "unit"), $._expression),

    rectangle_property: ($) => seq("block", $.rectangle),

    rectangle: ($) => seq($._expression, choice("x", "×"), $._expression),

    bits_property: ($) => seq("bits", $._expression, optional(seq("for", $._expression))),

    values_property: ($) => seq("values", field("type", $.name), optional(seq(choice("+", "-"), $._expression))),

    table: ($) =>
      seq(
        "table",
        field("name", $.name),
        "[",
        field("entries", $._expression),
        "]",
        choice(
          seq("=", $._expression),
          seq("from", $.string),
          seq("trained", $.arguments, "in", $.string),
          seq(":", $.type, "per", $._cover),
        ),
      ),

    field: ($) =>
      seq("field", field("name", $.name), ":", $.type, "per", $._cover, optional(seq("=", field("formula", $._expression)))),

    type: ($) => seq(field("name", $.name), optional(seq(token.immediate("("), $._expression, ")"))),

    _cover: ($) => choice("matrix", "row", "column", seq("flat", $._expression), $.rectangle),

    // Blocks that compute: the name is that of the window, the entry, or the place.
    computed: ($) => seq(choice("decode", "weight", "order"), field("name", $.name), $.block),

    block: ($) => seq("{", repeat($.let), field("result", $._expression), "}"),

    choice_property: ($) => seq(choice("scale", "rotate"), field("value", $.name), optional($.arguments)),

    steps_property: ($) => seq(choice("input", "output"), $.step, repeat(seq(",", $.step))),

    step: ($) => seq(field("name", $.name), optional(seq("(", separated(choice($.argument, $._expression)), ")"))),

    arguments: ($) => seq("(", separated($.argument), ")"),

    argument: ($) => seq(field("name", $.name), "=", $._expression),

    code: ($) => seq("code", $.body),

    fusion: ($) => seq("fusion", field("name", $.name), "{", repeat($.launch), "}"),

    launch: ($) =>
      seq("launch", $.name, repeat(seq("+", $.name)), optional(seq("{", repeat(choice($.prologue, $.epilogue)), "}"))),

    prologue: ($) => seq("prologue", $.name, repeat(seq(",", $.name))),

    epilogue: ($) => seq("epilogue", $.name, repeat(seq(",", $.name))),

    layout: ($) => seq("layout", field("name", $.name), "of", field("of", $.name), "{", repeat($._line), "}"),

    _line: ($) => choice($.container_type, $.tensor, $.record, $.place),

    container_type: ($) => seq("type", $._expression),

    tensor: ($) => seq("tensor", field("name", $.name), ":", $.type, $.sizes),

    record: ($) => seq("record", field("name", $.name), $.sizes, "{", repeat($.record_member), "}"),

    record_member: ($) => seq(field("name", $.name), ":", $.type, optional(seq("[", $._expression, "]"))),

    sizes: ($) => seq("[", separated($._expression), "]"),

    place: ($) =>
      seq(
        field("target", $.name),
        $.parameters,
        optional(seq("[", $._expression, optional(seq("..", $._expression)), "]")),
        optional(seq("-", $._expression)),
        "in",
        field("tensor", $.name),
        "[",
        separated(choice("*", $._expression)),
        "]",
        optional(seq(".", field("member", $.name), optional(seq("[", $._expression, "]")))),
        optional(seq("bit", $._expression)),
        optional(seq("read", field("element", $.name), $.block)),
      ),

    _expression: ($) =>
      choice($.number, $.name, $.list, $.call, $.index, $.unary, $.binary, $.conditional, $.parenthesized),

    parenthesized: ($) => seq("(", $._expression, ")"),

    list: ($) => seq("[", separated($._expression), "]"),

    // An index or a call touches what it applies to: a list at the start of a line is no index.
    call: ($) =>
      prec(PREC.postfix, seq(field("function", $.name), token.immediate("("), separated($._expression), ")")),

    index: ($) =>
      prec(
        PREC.postfix,
        seq(
          field("base", $._expression),
          token.immediate("["),
          field("index", $._expression),
          optional(seq("..", field("end", $._expression))),
          "]",
        ),
      ),

    unary: ($) => prec(PREC.sign, seq(choice("-", "~"), $._expression)),

    binary: ($) =>
      choice(
        ...[
          [PREC.compare, ["==", "!=", "<", "<=", ">", ">="]],
          [PREC.or, ["|"]],
          [PREC.xor, ["^"]],
          [PREC.and, ["&"]],
          [PREC.shift, ["<<", ">>"]],
          [PREC.sum, ["+", "-"]],
          [PREC.product, ["*", "/", "%"]],
        ].map(([level, operators]) =>
          prec.left(level, seq($._expression, field("operator", choice(...operators)), $._expression)),
        ),
        prec.right(PREC.power, seq($._expression, field("operator", "**"), $._expression)),
      ),

    conditional: ($) =>
      prec.right(PREC.if, seq("if", $._expression, "then", $._expression, "else", $._expression)),

    // `tcq_2.5`: a point belongs to a name where a digit follows.
    name: (_) => /[A-Za-z_][A-Za-z0-9_]*(\.[0-9][A-Za-z0-9_]*)*/,

    number: (_) => /0x[0-9A-Fa-f_]+|0b[01_]+|[0-9][0-9_]*(\.[0-9][0-9_]*)?/,

    string: (_) => /"[^"\n\r]*"/,

    doc_comment: (_) => token(prec(1, /\/\/\/[^\n\r]*/)),

    comment: (_) => token(/\/\/[^\n\r]*/),
  },
});
