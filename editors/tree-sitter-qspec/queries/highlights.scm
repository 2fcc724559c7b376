; Colours. The last pattern that fits wins.

(name) @variable

(number) @number
(string) @string
(comment) @comment
(doc_comment) @comment.documentation

(type name: (name) @type)
(values_property type: (name) @type)

[ "use" "family" "quantizer" "fusion" "function" "layout" ] @keyword

[ "window" "vector" "step" "bits" "block" "values" "unit" "table" "decode" "field" "weight" "scale" "rotate" "code"
  "order" "input" "output" "type" "tensor" "record" "launch" "prologue" "epilogue" ] @property

[ "let" "if" "then" "else" ] @keyword

[ "for" "per" "of" "in" "bit" "read" "from" "trained" "x" "×" ] @keyword.operator

[ "matrix" "row" "column" "flat" ] @constant.builtin

[ "+" "-" "*" "/" "%" "**" "&" "|" "^" "~" "<<" ">>" "==" "!=" "<" "<=" ">" ">=" "=" ".." ] @operator

[ "(" ")" "[" "]" "{" "}" ] @punctuation.bracket
[ "," ":" "." ] @punctuation.delimiter

(family name: (name) @type)
(quantizer name: (name) @type)
(fusion name: (name) @type)
(layout name: (name) @type of: (name) @type)
(member family: (name) @type)
(function name: (name) @function)
(call function: (name) @function)
(call function: (name) @function.builtin
  (#any-of? @function.builtin "byte" "sum_bytes" "signs" "parity" "count" "negate" "max" "min" "log2"))
(member family: (name) @function.builtin (#eq? @function.builtin "mix"))

(parameters (name) @variable.parameter)
(argument name: (name) @variable.parameter)
(choice_property value: (name) @constant.builtin)
((name) @constant.builtin (#any-of? @constant.builtin "rows" "cols"))

(field name: (name) @variable.member)
(record_member name: (name) @variable.member)
(place target: (name) @variable.member)
(place member: (name) @variable.member)
